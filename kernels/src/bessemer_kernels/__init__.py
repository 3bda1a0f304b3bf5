"""Compiled CPU kernels for Bessemer: where its libraries lie, and of which sources they are.

Bessemer loads the one for the processor (`bessemer/model/cpu_kernels/prebuilt.py`). Nothing here loads a library.
"""

import json
from pathlib import Path

_FOLDER = Path(__file__).parent
#: What the build wrote: version, hash of the sources, compiler, PyTorch's version, and the file of each tier.
BUILD = json.loads((_FOLDER / "build.json").read_text(encoding="utf-8"))
VERSION: str = BUILD["version"]
SOURCES: str = BUILD["sources"]
LIBRARIES: dict[str, Path] = {name: _FOLDER / file for name, file in BUILD["libraries"].items()}
