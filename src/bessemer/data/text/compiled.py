"""How the loops over bytes are compiled."""

from __future__ import annotations

from numba import njit

#: For functions that get all their arrays from outside and make none. They run without the interpreter's lock, and count no
#: references: Numba would raise and lower a counter for each array at each inner call, which took two thirds of the time of
#: `find_words`.
#:
#: What is compiled is kept beside the source and compiled again when *its own* file changes, not when a function or a constant
#: changes that it has from another one. So whoever edits `characters.py`, `tables.py` or `utf8.py` deletes `__pycache__`.
compiled = njit(cache=True, nogil=True, _nrt=False)  # type: ignore[call-overload]
