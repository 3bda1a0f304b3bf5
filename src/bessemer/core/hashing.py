"""Content hashes of values, files and folders, and seeds that are derived by hash.

A seed is a pure function of the recipe's seed and the name of its use, so it does not depend on what ran before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def hash_bytes(*parts: bytes | memoryview, bits: int = 128) -> str:
    """BLAKE2b of the parts, each prefixed by its length so that ("ab", "c") and ("a", "bc") differ; hexadecimal."""
    digest = hashlib.blake2b(digest_size=bits // 8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def hash_value(value: Any, bits: int = 128) -> str:
    """Hash of a JSON-like value; the order of keys does not matter. Raises TypeError for anything else."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hash_bytes(canonical.encode(), bits=bits)


def hash_file(path: Path, bits: int = 128, on_read: Callable[[int], None] | None = None) -> str:
    """Hash of a file's content, read in blocks; on_read is called with the bytes of each."""
    digest = hashlib.blake2b(digest_size=bits // 8)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
            if on_read is not None:
                on_read(len(block))
    return digest.hexdigest()


def hash_files(root: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """For each path below `root`: its name relative to it (POSIX), with `bytes` and `hash`; sorted by name."""
    return {
        path.relative_to(root).as_posix(): {"bytes": path.stat().st_size, "hash": hash_file(path)} for path in sorted(paths)
    }


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed in [0, 2**63) for one named use ("shuffle", step, …), a pure function of its arguments."""
    return int(hash_value([seed, *names], bits=64), 16) >> 1
