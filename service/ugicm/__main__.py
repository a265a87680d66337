from ugicm.cli import main

main()
