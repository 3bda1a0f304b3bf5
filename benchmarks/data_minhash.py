"""Near duplicates beside datatrove: the measurement `minhash` of deduplication.py, as a part of data.py."""

from __future__ import annotations

from deduplication import minhash as main

__all__ = ["main"]
