"""How fast batches come from token shards that are not in memory, on one core, beside PyTorch's own loader.

    python benchmarks/loader.py                         # a stream of 512 MB, in a temporary folder
    python benchmarks/loader.py --folder /fast/disk --megabytes 4096

Every way to read starts cold: the files are written to the disk and dropped from the page cache, and what the kernel then
fetches is counted. One process on one core reads batches of windows of a uint16 stream, in random order:

- `windows`: what `packing: stream` reads; `with sources`: each token's source too;
- `documents`: what `packing: documents` reads, after the plan of the rows is made, whose time is shown;
- `fill in the middle`: each of the two with `fim_rate: 0.5`;
- `DataLoader`: `torch.utils.data.DataLoader` over a dataset that slices a memory map and converts it, shuffled, in the
  process itself and with a worker, as LitGPT and most training scripts do; `get_batch`: nanoGPT's function.

All give int64 tensors of the same shapes. Rounds alternate; medians of three and their spread are printed. Result:
`loader.json`.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import recording
from bessemer.tokenization.shards import EncodedDocuments, ShardWriter, TokenShards
from bessemer.training.data.batches import TokenBatches
from bessemer.training.data.packing import DocumentBatches
from bessemer.training.data.token_stream import DocumentSources, FillInTheMiddle, FimTokens
from rounds import summary

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/training/data", "src/bessemer/tokenization")

ROUNDS = 3
VOCABULARY, BEGIN = 50_000, 49_999
ASKED = 5e6  # tokens/s
#: Ways to read, and how tables call them.
WAYS = {
    "windows": "windows (`packing: stream`)",
    "windows_with_sources": "windows with each token's source",
    "windows_fim": "windows, half of the documents rearranged to fill in the middle",
    "documents": "whole documents (`packing: documents`)",
    "documents_fim": "whole documents, half of them rearranged",
    "data_loader": "PyTorch's `DataLoader`, shuffled",
    "data_loader_one_worker": "the same with one worker",
    "get_batch": "nanoGPT's `get_batch`",
}


def write_stream(folder, megabytes):
    """A shard folder of so many megabytes: documents of log-normal lengths, as web pages and code have."""
    draw = np.random.default_rng(0)
    writer = ShardWriter(folder, tokenizer_hash="none", vocab_size=VOCABULARY, bos_id=BEGIN, shard_tokens=1 << 25)
    while writer.tokens * 2 < megabytes * 1e6:
        lengths = np.clip(draw.lognormal(6, 1.2, 4096), 1, 1e6).astype(np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        ids = draw.integers(0, VOCABULARY - 10, offsets[-1], dtype=np.uint32)
        first = writer.documents
        names = [f"{number:012d}" for number in range(first, first + len(lengths))]
        sources = ["code" if number % 3 == 0 else "web" for number in range(len(lengths))]
        writer.add(EncodedDocuments(names, sources, lengths * 4, ids, offsets))
    writer.finish()
    return TokenShards(folder)


def drop_from_memory(folder):
    """Put the files on the disk and take them out of the page cache."""
    for path in folder.glob("tokens-*.npy"):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_fetched():
    """What this process has made the kernel read from disks, where it says so."""
    try:
        fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="utf-8").splitlines())
    except OSError:
        return None
    return int(fields["read_bytes"])


def apart(make, steps):
    """Seconds, and bytes fetched, of reading so many batches, in a copy of this process: what it mapped ends with it, and the
    kernel can drop it for the next."""

    def work():
        before, start = bytes_fetched(), time.perf_counter()
        read = make()
        for step in range(steps):
            read(step)
        seconds = time.perf_counter() - start
        there.send((seconds, None if before is None else bytes_fetched() - before))

    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    answer = here.recv()
    process.join()
    return answer


class Windows(torch.utils.data.Dataset):
    """Windows of a memory-mapped stream, the way most training scripts have it."""

    def __init__(self, paths, context_length):
        self.maps = [np.load(path, mmap_mode="r") for path in paths]
        self.length = context_length
        counts = [(len(one) - 1) // context_length for one in self.maps]
        self.ends = np.cumsum(counts)

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, row):
        file = int(np.searchsorted(self.ends, row, "right"))
        start = (row - (int(self.ends[file - 1]) if file else 0)) * self.length
        window = torch.from_numpy(self.maps[file][start : start + self.length + 1].astype(np.int64))
        return window[:-1], window[1:]


def data_loader(paths, arguments, workers):
    """Batches of PyTorch's loader, one after another."""
    options = {"batch_size": arguments.batch_size, "shuffle": True, "num_workers": workers, "drop_last": True}
    loader = iter(torch.utils.data.DataLoader(Windows(paths, arguments.context_length), **options))
    return lambda step: next(loader)


def get_batch(paths, arguments):
    """nanoGPT's `get_batch`: the map is opened anew for each batch, and windows start anywhere."""

    def batch(step):
        stream = np.load(paths[step % len(paths)], mmap_mode="r")
        starts = torch.randint(len(stream) - arguments.context_length, (arguments.batch_size,))
        length = arguments.context_length
        x = torch.stack([torch.from_numpy(stream[i : i + length].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(stream[i + 1 : i + 1 + length].astype(np.int64)) for i in starts])
        return x, y

    return batch


def tables(figures):
    rows = [
        (
            label,
            ways["tokens_per_second"]["median"] / 1e6,
            ways["tokens_per_second"]["spread"],
            _megabytes(ways["fetched_bytes"]),
        )
        for name, label in WAYS.items()
        if (ways := figures["ways"].get(name))
    ]
    columns = [("", ""), ("million tokens/s", ".3g"), ("spread", ".0%"), ("MB fetched", ",.0f")]
    return {"speed": recording.table(columns, rows)}


def _megabytes(size):
    return None if size is None else size / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the stream is written; absent: a temporary folder")
    parser.add_argument("--megabytes", type=int, default=512, help="size of the stream")
    parser.add_argument("--batch-size", type=int, default=32, help="rows of a batch")
    parser.add_argument("--context-length", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--tokens", type=int, default=20_000_000, help="tokens read in each round")
    arguments = parser.parse_args()
    if not hasattr(os, "posix_fadvise"):
        recording.not_run("this system has no posix_fadvise, which takes files out of the page cache")
    torch.set_num_threads(1)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})

    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        folder = Path(place) / "tokens"
        shards = write_stream(folder, arguments.megabytes)
        paths = sorted(folder.glob("tokens-*.npy"))
        shape = {"batch_size": arguments.batch_size, "context_length": arguments.context_length, "seed": 1}
        start = time.perf_counter()
        packed = DocumentBatches(shards, **shape)
        planning = time.perf_counter() - start
        start = time.perf_counter()
        sources = DocumentSources(shards)
        indexing = time.perf_counter() - start
        middle = FillInTheMiddle(FimTokens(1, 2, 3), BEGIN, rate=0.5, spm_rate=0.5, seed=1)
        ways = {
            "windows": lambda: TokenBatches(shards, **shape).batch,
            "windows_with_sources": lambda: TokenBatches(shards, **shape, sources=sources).batch,
            "windows_fim": lambda: TokenBatches(shards, **shape, fill_in_the_middle=middle).batch,
            "documents": lambda: packed.batch,
            "documents_fim": lambda: rearranged.batch,
            "data_loader": lambda: data_loader(paths, arguments, 0),
            "data_loader_one_worker": lambda: data_loader(paths, arguments, 1),
            "get_batch": lambda: get_batch(paths, arguments),
        }
        rearranged = DocumentBatches(shards, **shape, fill_in_the_middle=middle)
        row_tokens = arguments.batch_size * arguments.context_length
        steps = arguments.tokens // row_tokens
        print(
            f"{shards.tokens:,} tokens in {shards.document_count:,} documents; rounds of {steps * row_tokens:,} tokens, "
            f"batches of {arguments.batch_size} × {arguments.context_length}; one core"
        )
        print(
            f"plan of {packed.rows:,} rows in {planning:.2f} s ({shards.document_count / planning:,.0f} documents/s), "
            f"{1 - packed.filled:.4%} of them empty; index of sources in {indexing:.2f} s\n"
        )
        speeds = {name: [] for name in ways}
        fetched = {}
        for _ in range(ROUNDS):
            for name, make in ways.items():
                drop_from_memory(folder)
                seconds, amount = apart(make, steps)
                speeds[name].append(steps * row_tokens / seconds)
                if amount is not None:
                    fetched[name] = amount
        found = {
            name: {"tokens_per_second": summary(rounds), "fetched_bytes": fetched.get(name)} for name, rounds in speeds.items()
        }
        print(f"{'':32} {'tokens/s':>14} {'spread':>7} {'fetched':>9}")
        for name, way in found.items():
            speed, amount = way["tokens_per_second"], _megabytes(way["fetched_bytes"])
            shown = "—" if amount is None else f"{amount:6.0f} MB"
            print(f"{name:32} {speed['median']:14,.0f} {speed['spread']:7.0%} {shown:>9}")
        figures = {
            "stream_bytes": 2 * shards.tokens,
            "ways": found,
            "documents_planned_per_second": shards.document_count / planning,
            "empty": 1 - packed.filled,
            "index_seconds": indexing,
            "asked": ASKED,
        }
    windows = found["windows"]["tokens_per_second"]["median"]
    print(f"\nasked: {ASKED:,.0f} tokens/s per core; windows reach {windows / ASKED:.1f} times that")
    os.sched_setaffinity(0, cores)  # the result names the machine, not what was used of it
    print(recording.save("loader", figures, tables=tables(figures), peers=("torch",)))


if __name__ == "__main__":
    main()
