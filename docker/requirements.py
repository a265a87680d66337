"""Write the dependencies of a pyproject.toml, and those of the extras named after it, one a line."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(sys.argv[1]).read_text())["project"]
requirements = list(project["dependencies"])
for extra in sys.argv[2:]:
    requirements += project["optional-dependencies"][extra]
sys.stdout.write("".join(f"{requirement}\n" for requirement in requirements))
