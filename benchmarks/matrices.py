"""The packed matrices beside PyTorch's own: the shapes of SmolLM2-135M, 1 to 512 rows, on two threads.

    python benchmarks/matrices.py [--threads 2] [--rows 1 4 8 32 512]

Each line is a whole step's matrices: 30 layers of q/k/v, output, gate/up and down, each with its own weights, so that one row
reads all of them from memory. The peers are `torch.ops.aten._weight_int4pack_mm_for_cpu` (groups of 32),
`torch._weight_int8pack_mm` (one scale an output) and a bfloat16 linear layer, all with bfloat16 activations, in turns with
ours; every round is kept, and the figure is their median. A plain read of the same number of bytes is timed beside them. Ends
in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import recording
from bessemer.core.environment import processor, set_environment
from rounds import summary

set_environment()  # before PyTorch reads it: threads that wait do not spin

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from bessemer.model.cpu_kernels import library, unavailable  # noqa: E402
from bessemer.model.cpu_kernels.packed import PackedMatrix  # noqa: E402
from bessemer.model.quantisation.integers import IntegerScheme  # noqa: E402
from bessemer.model.quantisation.quantised_layers import QuantisedLinear  # noqa: E402
from bessemer.model.quantisation.schemes import (  # noqa: E402
    Int4,
    Int8,
)

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/model/cpu_kernels", "src/bessemer/model/quantisation")

# Shapes: M rows, N outputs, K inputs.

LAYERS, SHAPES = 30, ((960, 576), (576, 576), (3072, 576), (576, 1536))
WEIGHTS = LAYERS * sum(outputs * inputs for outputs, inputs in SHAPES)
ROUNDS, SECONDS = 7, 0.15
ROWS = (1, 4, 8, 32, 512)

Product = Callable[[Tensor], Tensor]


def ours(scheme: IntegerScheme | None) -> tuple[list[Product], int]:
    """A product for every matrix, and the bytes of all."""
    matrices = []
    for outputs, inputs in SHAPES * LAYERS:
        if scheme is None:
            matrices.append(PackedMatrix.of(nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16)))
            continue
        layer = QuantisedLinear(inputs, outputs, scheme)
        low, high = (0, 256) if scheme.bits == 4 else (-127, 128)
        layer.codes = torch.randint(low, high, layer.codes.shape).to(layer.codes.dtype)
        layer.scales = torch.full(layer.scales.shape, 2.0**-10)
        matrices.append(PackedMatrix.of(layer))
    return [matrix.multiply for matrix in matrices], sum(matrix.nbytes for matrix in matrices)


def torch_int4() -> list[Product]:
    products: list[Product] = []
    for outputs, inputs in SHAPES * LAYERS:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            torch.randint(0, 16, (outputs, inputs), dtype=torch.int32), 2
        )
        scales = torch.full((inputs // 32, outputs, 2), 2.0**-10, dtype=torch.bfloat16)
        products.append(lambda x, p=packed, s=scales: torch.ops.aten._weight_int4pack_mm_for_cpu(x, p, 32, s))
    return products


def torch_int8() -> list[Product]:
    products: list[Product] = []
    for outputs, inputs in SHAPES * LAYERS:
        codes = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        scales = torch.full((outputs,), 2.0**-10, dtype=torch.bfloat16)
        products.append(lambda x, c=codes, s=scales: torch._weight_int8pack_mm(x, c, s))
    return products


def torch_bfloat16() -> list[Product]:
    weights = [torch.randn(outputs, inputs).bfloat16() for outputs, inputs in SHAPES * LAYERS]
    return [lambda x, w=weight: functional.linear(x, w) for weight in weights]


def seconds(products: list[Product], inputs: dict[int, Tensor]) -> float:
    """One step's time: the best of as many as fit, so that a neighbour's turn does not count."""
    best, end = float("inf"), time.perf_counter() + SECONDS
    while best == float("inf") or time.perf_counter() < end:
        begin = time.perf_counter()
        for product, (_, width) in zip(products, SHAPES * LAYERS, strict=True):
            product(inputs[width])
        best = min(best, time.perf_counter() - begin)
    return best


def read_speed(size: int) -> float:
    """Bytes a second of a plain read of so many."""
    memory, best = torch.ones(size // 8, dtype=torch.int64), float("inf")
    for _ in range(10):
        begin = time.perf_counter()
        memory.sum()
        best = min(best, time.perf_counter() - begin)
    return size / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    kernels = library()
    if kernels is None:
        recording.not_run(f"there are no kernels to measure: {unavailable()}")
    arithmetic = kernels.bessemer_arithmetic().decode()
    print(f"{processor()}, {chosen.threads} threads, {arithmetic}; {WEIGHTS / 1e6:.0f}M weights")
    figures: dict[str, Any] = {"threads": chosen.threads, "arithmetic": arithmetic, "weights": WEIGHTS}
    table = []
    for key, kind, scheme, peer in (
        ("int4", "4 bits, groups of 32", Int4(32), torch_int4),
        ("int8", "8 bits, by output", Int8(), torch_int8),
        ("bfloat16", "bfloat16", None, torch_bfloat16),
    ):
        (products, size), theirs = ours(scheme), peer()
        read = read_speed(size)
        print(f"{kind}: {size / 1e6:.0f} MB, a plain read {read / 1e9:.1f} GB/s")
        figures[key] = {"bytes": size, "plain_read_bytes_per_second": read, "rows": {}}
        for rows in chosen.rows:
            floats = {inputs: torch.randn(rows, inputs) for _, inputs in SHAPES}
            halves = {inputs: x.bfloat16() for inputs, x in floats.items()}
            times: dict[str, list[float]] = {"ours": [], "torch": []}
            for _ in range(ROUNDS):
                times["ours"].append(seconds(products, floats))
                times["torch"].append(seconds(theirs, halves))
            timed = {name: summary(each) for name, each in times.items()}
            own, other = (timed[name]["median"] for name in ("ours", "torch"))
            found = {
                "bessemer_seconds": timed["ours"],
                "torch_seconds": timed["torch"],
                "ratio": other / own,
                "bytes_per_second": size / own,
                "operations_per_second": 2 * WEIGHTS * rows / own,
            }
            figures[key]["rows"][str(rows)] = found
            speed = found["bytes_per_second"] / 1e9, found["operations_per_second"] / 1e9
            table.append([f"{kind}: {rows} {'row' if rows == 1 else 'rows'}", 1e3 * own, 1e3 * other, other / own, *speed])
            print(
                f"  {rows:4} rows: {own * 1e3:8.2f} ms, torch {other * 1e3:8.2f} ms ({other / own:.1f}×), "
                f"{speed[0]:.1f} GB/s, {speed[1]:.0f} GOP/s"
            )
    print(json.dumps(figures))
    if list(chosen.rows) != list(ROWS):
        print("no result is written: not every number of rows was measured")
        return
    columns = [("weights", ""), ("ours, ms", ",.2f"), ("PyTorch, ms", ",.2f"), ("ratio", ".1f~ ×"), ("GB/s", ".1f")]
    table = recording.table([*columns, ("GOP/s", ",.0f")], table)
    recording.save("matrices", figures, tables={"steps": table}, peers=["torch"])


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    main()
