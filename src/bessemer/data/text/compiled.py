"""How the loops over bytes are compiled."""

from __future__ import annotations

from numba import njit

#: For functions that get all their arrays from outside and make none. They hold the interpreter's lock no longer than it
#: takes to begin, and count no references: Numba would raise and lower a counter for each array at each inner call, which
#: took two thirds of the time of `find_words`.
compiled = njit(cache=True, nogil=True, _nrt=False)  # type: ignore[call-overload]
