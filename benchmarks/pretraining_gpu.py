"""Model FLOPs utilisation of pretraining at about a billion parameters on one GPU, with and without float8, and where the rest
of the time goes.

    python benchmarks/pretraining_gpu.py               # bfloat16, then float8 where the card and torchao have it
    python benchmarks/pretraining_gpu.py --smoke       # the same code on any processor, with a toy model: no measurement

The loop's own step on random tokens, compiled block by block, AdamW, in a fresh process for each type. A measurement is the
best of three groups of steps and refuses to speak when they spread over 30 %. Then a few steps are profiled, and the kernels'
time is sorted by kind; what is left of the wall clock is idle: the launch of kernels, Python, the wait for data. MFU is against
the card's dense bfloat16 peak, float8's too. Result: `pretraining_gpu.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import recording
from rounds import summary

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/training", "src/bessemer/model", "src/bessemer/distributed")

BILLION = {
    "vocab_size": 65536, "hidden_size": 2048, "num_hidden_layers": 20, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 128, "intermediate_size": 5632, "max_position_embeddings": 2048,
}  # fmt: skip
TOY = {
    "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 128, "max_position_embeddings": 64,
}  # fmt: skip
GROUPS, LARGEST_SPREAD, ATTEMPTS, PROFILED = 3, 0.3, 4, 3

#: Kinds of kernels by pieces of their names; the first that is found counts.
KINDS = {
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "communication": ("nccl", "c10d"),
    "optimizer": ("adam", "multi_tensor", "optimizer", "foreach"),
    "products": ("gemm", "nvjet", "cutlass", "cublas", "::mm", "::addmm", "::bmm", "scaled_mm", "::matmul", "::linear"),
    "copies": ("memcpy", "memset", "copy", "::cat", "::fill_", "::zero_"),
}


def kind_of(name: str) -> str:
    """What a kernel or an operator does."""
    lower = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in lower for part in parts)), "norms, activations, sums")


def measure(mode: str, smoke: bool) -> dict[str, Any]:
    """Speed, MFU, memory and the shares of a step's time, of one type."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from bessemer.distributed.mesh import ALONE
    from bessemer.model.config import ModelConfig
    from bessemer.model.initialisation import initial_decoder
    from bessemer.scaling.hardware import card_of_device
    from bessemer.training.data.batch import Batch
    from bessemer.training.model_setup import prepare_model
    from bessemer.training.monitoring.profiler import measured_peak, own_times
    from bessemer.training.objectives import next_token_loss
    from bessemer.training.optim.optimizers import build_optimizers
    from bessemer.training.pretrain_config import PretrainConfig
    from bessemer.training.runtime import Runtime
    from bessemer.training.trainer import Trainer

    device = torch.device("cpu" if smoke else "cuda")
    shape, rows, length, steps = (TOY, 4, 64, 2) if smoke else (BILLION, 8, 2048, 5)
    config = PretrainConfig(
        steps=1, batch_size=rows, context_length=length, optimizer="adamw", dtype="bfloat16", compile=not smoke,
        float8=mode == "float8", threads=1 if smoke else None,
    )  # fmt: skip
    runtime = Runtime.of(config, device)
    card = None if smoke else card_of_device(runtime.processor)
    peak = measured_peak(runtime) if smoke else card.flops if card else None
    with runtime.running():
        model = initial_decoder(ModelConfig(**shape), seed=1).to(device)
        parts, _ = prepare_model(model, config, runtime, ALONE)
        trainer = Trainer(parts, build_optimizers(parts, config), next_token_loss, runtime, gradient_clip=1.0)
        tokens_BT = torch.randint(0, shape["vocab_size"], (rows, length + 1), generator=torch.Generator().manual_seed(1))
        batch = Batch(tokens_BT[:, :-1], tokens_BT[:, 1:])

        def seconds(count: int) -> float:
            start = time.perf_counter()
            for _ in range(count):
                trainer.step(batch)
            if not smoke:
                torch.cuda.synchronize()
            return (time.perf_counter() - start) / count

        seconds(2 if smoke else 10)
        for _ in range(ATTEMPTS):
            groups = summary(seconds(steps) for _ in range(GROUPS))
            if groups["spread"] <= LARGEST_SPREAD:
                break
        activities = [ProfilerActivity.CPU] + ([] if smoke else [ProfilerActivity.CUDA])
        with profile(activities=activities) as record:
            profiled = seconds(PROFILED)
    times: dict[str, float] = {}
    for name, _, spent in own_times(record.key_averages()):
        times[kind_of(name)] = times.get(kind_of(name), 0.0) + spent / PROFILED
    busy, best = sum(times.values()), min(groups["rounds"])
    rate = rows * length / best
    needed = parts.config.flops_per_token(length) * rate
    return {
        "card": runtime.processor,
        "parameters": parts.config.parameters(),
        "tokens_per_second": rate,
        "mfu": None if peak is None else needed / peak,
        "peak_flops": peak,
        "step_seconds": groups,
        "peak_memory_bytes": None if smoke else torch.cuda.max_memory_allocated(),
        "profiled_step_seconds": profiled,
        "kernel_seconds": dict(sorted(times.items(), key=lambda item: -item[1])),
        "idle_seconds": max(0.0, profiled - busy),
    }


def show(mode: str, found: dict[str, Any], smoke: bool) -> None:
    """A measurement in words, the step's time by kind."""
    used = "MFU unknown, the card is none of ours" if found["mfu"] is None else f"{found['mfu']:.1%} MFU"
    print(f"{mode} on {found['card']}: {found['parameters']:,} parameters")
    print(f"  {found['tokens_per_second']:,.0f} tokens/s, {used}" + (" (a smoke test, no measurement)" if smoke else ""))
    for kind, spent in [*found["kernel_seconds"].items(), ("idle", found["idle_seconds"])]:
        print(f"  {kind:<26} {1e3 * spent:>9.2f} ms  {spent / found['profiled_step_seconds']:>6.1%}")


def tables(figures: dict[str, Any]) -> dict[str, Any]:
    """Speed by type, and where a step's time goes."""
    speeds = [
        (mode, found["tokens_per_second"], found["mfu"], found["peak_memory_bytes"] / 1e9) for mode, found in figures.items()
    ]
    kinds = dict.fromkeys(kind for found in figures.values() for kind in found["kernel_seconds"])
    shares = [
        (kind, *(found["kernel_seconds"].get(kind, 0.0) / found["profiled_step_seconds"] for found in figures.values()))
        for kind in kinds
    ]
    shares.append(("idle", *(found["idle_seconds"] / found["profiled_step_seconds"] for found in figures.values())))
    return {
        "speed": recording.table([("", ""), ("tokens/s", ",.0f"), ("MFU", ".1%"), ("GB of memory at the peak", ".1f")], speeds),
        "step": recording.table([("Share of a step", ""), *((mode, ".1%") for mode in figures)], shares),
    }


def obstacle(mode: str, smoke: bool) -> str | None:
    """Why a type cannot be measured here, in one line; None when it can."""
    import importlib.util

    import torch

    if smoke:
        return None if mode == "bfloat16" else "float8 needs a GPU"
    if mode == "float8" and torch.cuda.get_device_capability() < (8, 9):
        return f"{torch.cuda.get_device_name()} has no float8"
    if mode == "float8" and importlib.util.find_spec("torchao") is None:
        return "float8 needs torchao: pip install torchao"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="Exercise the code on a processor, with a toy model.")
    parser.add_argument("--measure", choices=("bfloat16", "float8"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.smoke)))
        return 0
    import torch

    if not arguments.smoke and not torch.cuda.is_available():
        recording.not_run("there is no GPU; --smoke runs the code on a processor")
    figures: dict[str, Any] = {}
    for mode in ("bfloat16", "float8"):
        reason = obstacle(mode, arguments.smoke)
        if reason is not None:
            print(f"{mode}: left out, {reason}")
            continue
        command = [sys.executable, "-W", "ignore", __file__, "--measure", mode, *(["--smoke"] if arguments.smoke else [])]
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
        if done.returncode:
            raise SystemExit(f"{mode}: {done.stderr}")
        found = json.loads(done.stdout.splitlines()[-1])
        spread = found["step_seconds"]["spread"]
        if not arguments.smoke and spread > LARGEST_SPREAD:
            raise SystemExit(f"{mode}: times spread by {spread:.0%}; other work disturbs this machine, nothing is said")
        show(mode, found, arguments.smoke)
        figures[mode] = found
    if not arguments.smoke:
        print(recording.save("pretraining_gpu", figures, tables=tables(figures), peers=("torch",), note=f"On {found['card']}."))
    return 0


if __name__ == "__main__":
    sys.exit(main())
