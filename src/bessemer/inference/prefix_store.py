"""Prefixes on disk: keys and values that requests had in common are found again after a restart.

An agent begins every conversation with the same thousands of tokens of instructions and tools, which take a processor long.
The prefix cache (`scheduling/block_tables.py`) computes them once for as long as the process lives; this store keeps them
beyond. When a request finds blocks in the cache that an earlier request has left, they are written to a file. When a request
arrives whose blocks the cache lacks, those that lie on disk are read into free blocks and sealed, and the scheduler finds them
as it finds any other.

A file belongs to one model, one type and size of blocks, and one kind of arithmetic (`store_identity`): keys of other weights
would be read without an error. Blocks are named by the hash of all the text up to their end (`chain_hash`), so a file holds
numbers and hashes. With the model a guess of the text can be checked against them: the folder is readable by its owner alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bessemer.core.errors import ConfigError
from bessemer.core.hashing import hash_value
from bessemer.core.store import new_file
from bessemer.inference.execution.kv_cache import PagedMemory
from bessemer.inference.scheduling.block_tables import BlockTables
from bessemer.inference.scheduling.sequence import TokenSequence

#: Version of the files.
_FORMAT = 1
#: Tokens of the shortest prefix that is worth a file, and a read.
LEAST_TOKENS = 256


class _Row(NamedTuple):
    """Where a block lies: a file, and its place in the tensors of its group there."""

    path: Path
    place: int


def store_identity(model: str, block_size: int, arithmetic: str, batch_invariant: bool) -> str:
    """What the blocks of a file depend on besides the text. model: of `OpenedModel.identity`."""
    return hash_value([_FORMAT, model, block_size, arithmetic, batch_invariant])


class PrefixStore:
    """The blocks of one model on disk, and the thread that writes them.

    folder: of all stores; this model's files lie in one below it. limit: bytes of these, of which those that were used longest
    ago go first. say: receives one line when the store cannot be written, after which it is only read.

    Raises ConfigError where the folder cannot be made.
    """

    def __init__(
        self, folder: Path, identity: str, memory: PagedMemory, tables: BlockTables, *, limit: float, say: Callable[[str], None]
    ) -> None:
        self._folder = folder.expanduser() / identity
        self._memory = memory
        self._tables = tables
        self._limit = limit
        self._say = say
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="prefix-store")
        self._writing: set[bytes] = set()
        self._written: list[Future[Path]] = []
        self._writes = True
        #: Of each group of layers, where the block of a hash lies.
        self._rows: list[dict[bytes, _Row]] = [{} for _ in memory.groups]
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            files = sorted(self._folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
        except OSError as error:
            raise ConfigError(f"prefix_store: {self._folder} cannot be used: {error.strerror}") from None
        for path in files:
            self._index(path)

    @property
    def blocks(self) -> int:
        """Blocks of the first group of layers that lie on disk."""
        return len(self._rows[0])

    def fetch(self, sequence: TokenSequence) -> int:
        """Read what the cache lacks of a waiting sequence's prefix into free blocks, and seal these. Tokens that were read."""
        self._settle()
        if not self._rows[0] or self._tables.epoch:
            return 0
        size, begin = self._tables.block_size, self._tables.match(sequence)
        most = (len(sequence.tokens) - 1) // size
        chain = self._tables.extend_chain(sequence, most)
        end = begin
        while end < most and all(self._is_at_hand(index, chain[end + 1]) for index in self._whole_groups()):
            end += 1
        if (end - begin) * size < LEAST_TOKENS:
            return 0
        needed = self._tables.blocks(len(sequence.tokens)) - begin
        if any(pool.free < needed for pool, _ in self._tables.groups):
            return 0
        for index in range(len(self._rows)):
            try:
                self._fill(index, chain[1 : end + 1])
            except (OSError, SafetensorError, KeyError):
                # another process has removed a file, or it is damaged: the prompt is computed as without a store
                self._forget_unreadable()
                return 0
        return (end - begin) * size

    def keep(self, sequence: TokenSequence) -> None:
        """Write the blocks that a sequence, just admitted, has found in the cache, as far as they are not on disk yet."""
        self._settle()
        if not self._writes or sequence.cached < LEAST_TOKENS or self._tables.epoch:
            return
        keys = sequence.chain[1 : sequence.cached // self._tables.block_size + 1]
        wanted = [
            [key for key in keys if key in pool and key not in rows and key not in self._writing]
            for (pool, _), rows in zip(self._tables.groups, self._rows, strict=True)
        ]
        if len(wanted[0]) * self._tables.block_size < LEAST_TOKENS:
            return
        tensors: dict[str, Tensor] = {}
        for index, (some, (pool, _)) in enumerate(zip(wanted, self._tables.groups, strict=True)):
            places = [block for key in some if (block := pool.find(key)) is not None]
            for name, pages in self._pages(index):
                tensors[name] = pages[places].contiguous().cpu()
        self._writing.update(*wanted)
        self._written.append(self._writer.submit(self._write, wanted, tensors))

    def close(self) -> None:
        """Wait until what is being written is on disk; nothing is written afterwards."""
        self._writer.shutdown(wait=True)
        self._settle()
        self._writes = False

    # -- inside

    def _whole_groups(self) -> list[int]:
        """Groups in which a prefix needs all of its blocks: those without a window."""
        whole = [index for index, (_, window) in enumerate(self._tables.groups) if window is None]
        return whole or [0]

    def _is_at_hand(self, group: int, key: bytes) -> bool:
        return key in self._tables.groups[group].pool or key in self._rows[group]

    def _fill(self, group: int, keys: Sequence[bytes]) -> None:
        """Read the blocks of a group that are on disk and not in the cache; after an error they are blank."""
        pool, rows = self._tables.groups[group].pool, self._rows[group]
        # held, so that what is allocated does not evict them
        blocks = {key: block for key in keys if (block := pool.find(key)) is not None}
        for block in blocks.values():
            pool.share(block)
        missing = [key for key in keys if key not in blocks and key in rows][: pool.free]
        by_file: dict[Path, list[bytes]] = {}
        for key in missing:
            blocks[key] = pool.allocate()
            by_file.setdefault(rows[key].path, []).append(key)
        try:
            for path, some in by_file.items():
                self._read(path, [rows[key].place for key in some], group, [blocks[key] for key in some])
            for key in missing:
                pool.seal(blocks[key], key)
        finally:
            # the last first, so that the beginning of the text is evicted last
            for key in reversed(keys):
                if key in blocks:
                    pool.release(blocks[key])

    def _read(self, path: Path, places: Sequence[int], group: int, blocks: Sequence[int]) -> None:
        first, last = min(places), max(places) + 1
        with safe_open(path, framework="pt") as file:
            for name, pages in self._pages(group):
                taken = file.get_slice(name)[first:last][[place - first for place in places]]
                pages[list(blocks)] = taken.to(pages.device)
        # the time of the last use
        os.utime(path)

    def _pages(self, group: int) -> list[tuple[str, Tensor]]:
        """The tensors of a group's pages, (P, …), by the name that they have in a file."""
        return [
            (f"{layer}.{part}", pages)
            for layer in self._memory.groups[group].layers
            for part, pages in enumerate(self._memory.stored(layer))
        ]

    def _write(self, keys: Sequence[Sequence[bytes]], tensors: dict[str, Tensor]) -> Path:
        path = self._folder / f"{keys[0][-1].hex()}.safetensors"
        metadata = {"format": str(_FORMAT), "keys": json.dumps([[key.hex() for key in some] for some in keys])}
        with new_file(path) as place:
            save_file(tensors, place, metadata=metadata)
        self._remove_oldest(besides=path)
        return path

    def _settle(self) -> None:
        """Note what has been written since the last call, and forget what was removed for it."""
        while self._written and self._written[0].done():
            done = self._written.pop(0)
            error = done.exception()
            if error is None:
                self._index(done.result())
                self._forget_unreadable()
            elif self._writes:
                self._writes = False
                self._say(f"  prefix_store: {self._folder} cannot be written ({error}); it is only read from now on")

    def _index(self, path: Path) -> None:
        """Note the blocks of a file; one that is damaged, or of another format, is left alone."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                names = set(file.keys())
            by_group = [[bytes.fromhex(key) for key in some] for some in json.loads(metadata["keys"])]
        except (OSError, SafetensorError, KeyError, ValueError, TypeError):
            return
        wanted = {name for index in range(len(self._rows)) for name, _ in self._pages(index)}
        if metadata.get("format") != str(_FORMAT) or len(by_group) != len(self._rows) or names != wanted:
            return
        for rows, keys in zip(self._rows, by_group, strict=True):
            for place, key in enumerate(keys):
                rows[key] = _Row(path, place)

    def _remove_oldest(self, besides: Path) -> None:
        """Remove files until the rest is within the limit."""
        files = sorted(self._folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
        total = sum(path.stat().st_size for path in files)
        for path in files:
            if total <= self._limit:
                return
            if path != besides:
                total -= path.stat().st_size
                path.unlink(missing_ok=True)

    def _forget_unreadable(self) -> None:
        """Forget the blocks of files that are gone or damaged."""
        paths = {row.path for rows in self._rows for row in rows.values()}
        gone = {path for path in paths if not _is_readable(path)}
        if gone:
            self._rows = [{key: row for key, row in rows.items() if row.path not in gone} for rows in self._rows]
            self._writing.clear()


def _is_readable(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False
