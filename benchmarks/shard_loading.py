"""Memory of eight processes on one host that load a model to train it: each the whole, to shard it, or each its shards.

    python benchmarks/shard_loading.py          # about two minutes on two cores

A model of 348M parameters lies in bfloat16 on disk, 0.7 GB, and is trained in float32, 1.4 GB. Peaks are of a process's own
memory, without mapped files, which the system may take back; sampled 200 times a second from the start of loading. The second
table is of making a new model of that size in float32: drawn whole and then written, or each tensor when it is written. Result:
`shard_loading.json`.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import recording

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/distributed", "src/bessemer/model", "src/bessemer/training")

PROCESSES, VOCABULARY = 8, 32_768
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 1024,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 4096,
    "tie_word_embeddings": True,
}
LAYOUTS: list[dict[str, Any]] = [{"data_shard": 8}, {"pipeline": 2, "data_shard": 2, "tensor": 2}]


def own_memory() -> int:
    """Bytes of this process's own memory now."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


@contextmanager
def peak() -> Iterator[dict[str, float]]:
    """Bytes of this process's own memory before, and at most while entered."""
    found, ends = {"before": float(own_memory()), "peak": 0.0}, threading.Event()

    def sample() -> None:
        while not ends.wait(0.005):
            found["peak"] = max(found["peak"], own_memory())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ends.set()
        thread.join()
        found["peak"] = max(found["peak"], own_memory())


def load(rank: int, rendezvous: str, folder: str, parallel: dict[str, Any], by_shards: bool) -> dict[str, float]:
    """Load the model in one process of the job, ready to be trained."""
    import torch
    import torch.distributed as dist

    from bessemer.distributed.mesh import Mesh
    from bessemer.distributed.parallelize import load_shards
    from bessemer.model.initialisation import empty_decoder
    from bessemer.model.storage.folder import load_model
    from bessemer.model.storage.model_config import read_model_config
    from bessemer.model.storage.weights import find_tensors
    from bessemer.training.model_setup import prepare_model
    from bessemer.training.pretrain_config import PretrainConfig
    from bessemer.training.runtime import Runtime

    torch.set_num_threads(1)
    store = dist.FileStore(rendezvous, PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    config = PretrainConfig(
        steps=1, batch_size=PROCESSES, context_length=256, dtype="float32", compile=False, threads=1, parallel=parallel
    )
    mesh, runtime = Mesh.here(config.parallel, "cpu"), Runtime.of(config, torch.device("cpu"))
    dist.barrier()
    with peak() as found:
        if by_shards:
            stored = find_tensors(Path(folder), read_model_config(Path(folder)))
            prepared = prepare_model(empty_decoder(stored.config), config, runtime, mesh)
            load_shards(prepared.parts, stored, runtime.device)
        else:
            prepared = prepare_model(load_model(folder, dtype=torch.float32), config, runtime, mesh)
        # a host must have the memory that its processes take at the same time
        dist.barrier()
    found["held"] = float(own_memory())
    assert not any(parameter.is_meta for part in prepared.parts for parameter in part.parameters())
    dist.destroy_process_group()
    return found


def make(folder: str, whole: bool) -> dict[str, float]:
    """Write a new model in float32."""
    from bessemer.model.config import ModelConfig
    from bessemer.model.initialisation import initial_decoder
    from bessemer.model.storage.folder import save_initial_model, save_model

    config = ModelConfig(**SHAPE)
    with peak() as found:
        if whole:
            save_model(initial_decoder(config, 0), Path(folder), tokenizer=None)
        else:
            save_initial_model(config, 0, Path(folder), tokenizer=None)
    return found


def convert(source: str, folder: str) -> dict[str, float]:
    """The same model in bfloat16; its size and that of its largest tensor in float32, in bytes."""
    import torch

    from bessemer.model.storage.folder import load_model, save_model

    model = load_model(source, dtype=torch.bfloat16)
    save_model(model, Path(folder), tokenizer=None, shard_bytes=200_000_000)
    sizes = [4 * parameter.numel() for parameter in model.parameters()]
    return {"model": float(sum(sizes)), "largest_tensor": float(max(sizes))}


def in_processes(count: int, function: Callable[..., dict[str, float]], *arguments: Any, ranked: bool = False) -> list[Any]:
    """What a function returns in fresh processes that run at the same time. ranked: its first argument is the rank."""
    pool: Pool
    with multiprocessing.get_context("spawn").Pool(count) as pool:
        calls = [pool.apply_async(function, (rank, *arguments) if ranked else arguments) for rank in range(count)]
        return [call.get() for call in calls]


def tables(figures: dict[str, Any]) -> dict[str, Any]:
    loading = recording.table(
        [
            ("layout of 8 processes", ""),
            ("each loads", ""),
            ("GB of a process's own at the peak", ".2f"),
            ("of all 8", ".1f"),
            ("GB of a process's own before", ".2f"),
        ],
        [(row["layout"], row["loads"], *(row[key] / 1e9 for key in ("peak", "all", "before"))) for row in figures["loading"]],
    )
    making = recording.table(
        [("a new model is", ""), ("GB of the process's own at the peak", ".2f"), ("before", ".2f")],
        [(row["made"], row["peak"] / 1e9, row["before"] / 1e9) for row in figures["making"]],
    )
    return {"loading": loading, "making": making}


def main() -> None:
    if not Path("/proc/self/status").exists():
        recording.not_run("memory of a process's own is read where Linux tells it, in /proc/self")
    os.environ["OMP_NUM_THREADS"] = "1"
    figures: dict[str, Any] = {"making": [], "loading": []}
    with tempfile.TemporaryDirectory() as work:
        float32, bfloat16 = f"{work}/float32", f"{work}/bfloat16"
        for made, whole in (("drawn whole, then written", True), ("drawn tensor by tensor", False)):
            (found,) = in_processes(1, make, float32, whole)
            figures["making"].append({"made": made} | found)
            print(figures["making"][-1], flush=True)
        (sizes,) = in_processes(1, convert, float32, bfloat16)
        figures |= sizes
        for number, parallel in enumerate(LAYOUTS):
            for loads, by_shards in (("the whole model", False), ("its shards", True)):
                file = f"{work}/rendezvous-{number}-{by_shards}"
                found = in_processes(PROCESSES, load, file, bfloat16, parallel, by_shards, ranked=True)
                most = {key: max(one[key] for one in found) for key in ("peak", "before", "held")}
                layout = " × ".join(f"{name} {size}" for name, size in parallel.items())
                row = {"layout": layout, "loads": loads, **most, "all": sum(one["peak"] for one in found), "ranks": found}
                figures["loading"].append(row)
                print({key: value for key, value in row.items() if key != "ranks"}, flush=True)
    print(recording.save("shard_loading", figures, tables=tables(figures)))


if __name__ == "__main__":
    import shard_loading  # so that the functions have a module's name in other processes

    shard_loading.main()
