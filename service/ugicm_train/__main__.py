from ugicm_train.cli import main

raise SystemExit(main())
