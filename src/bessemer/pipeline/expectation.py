"""Minutes and bits per byte to expect of the quickstart on this machine, measured in about a second for `bessemer doctor`."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from bessemer.core.environment import cxx_compiler, usable_cores
from bessemer.model.config import ModelConfig
from bessemer.model.device import is_fast, product_flops
from bessemer.model.initialisation import initial_decoder
from bessemer.model.presets import PRESETS
from bessemer.pipeline.recipe import load_recipe
from bessemer.training.head import linear_cross_entropy

#: (steps, bits per byte after them) of pretraining with 4,096 tokens a step, measured in runs of the quickstart. The three
#: longest runs are those of docs/machines.md; the others were made on slower machines.
_BITS_BY_STEPS = ((39, 2.82), (86, 2.55), (133, 2.42), (207, 2.32), (395, 2.19), (758, 2.05))
#: Seconds of an optimizer step over those of the forward and the backward pass.
_STEP_OVER_PASSES = 1.15
#: Time of compiled blocks over that of eager ones.
_COMPILED = 0.88
#: On the machine of these measurements: seconds of a pretraining step, and of the stages that have a time limit.
_MEASURED_STEP = 0.24
_MEASURED_STAGES = {"sft": 95.0, "reward": 13.0, "preference": 12.0, "rl": 40.0, "evaluate": 33.0}
#: Seconds of the other stages and of installing: on two cores or more, and on one.
_OTHER_SECONDS, _OTHER_SECONDS_ONE_CORE = 150.0, 240.0


@dataclass(frozen=True)
class Expectation:
    """What the quickstart will take. arithmetic: PyTorch's name for its CPU kernels. flops: FLOP/s of matmuls by dtype.

    steps: of pretraining. bits_per_byte: after pretraining.
    """

    arithmetic: str
    dtype: str
    flops: dict[str, float]
    minutes: float
    steps: int
    bits_per_byte: float


def expected_quickstart() -> Expectation:
    """Measure products and two steps of the quickstart's model on the processor; about a second, three where it is slow."""
    cpu = torch.device("cpu")
    dtype = torch.bfloat16 if is_fast(torch.bfloat16, cpu) else torch.float32
    stages = load_recipe("quickstart").stages
    pretrain: Any = next(stage.config for stage in stages if stage.name == "pretrain")
    seconds = _pass_seconds(dtype, pretrain.batch_size, pretrain.context_length) * _STEP_OVER_PASSES
    if cxx_compiler() is not None:
        seconds *= _COMPILED
    steps = max(1, int(60 * pretrain.minutes / seconds))
    total = 60 * pretrain.minutes + (_OTHER_SECONDS if usable_cores() > 1 else _OTHER_SECONDS_ONE_CORE)
    for stage in stages:
        if stage.name in _MEASURED_STAGES:
            limit = getattr(stage.config, "minutes", None) or math.inf
            total += min(60 * limit, _MEASURED_STAGES[stage.name] * seconds / _MEASURED_STEP)
    return Expectation(
        arithmetic=torch.backends.cpu.get_cpu_capability(),
        dtype=str(dtype).removeprefix("torch."),
        flops={name: product_flops(getattr(torch, name)) for name in ("float32", "bfloat16")},
        minutes=total / 60,
        steps=steps,
        bits_per_byte=bits_after(steps),
    )


def bits_after(steps: int) -> float:
    """Bits per byte after a number of steps: linear in log(steps) between the measured runs, and no better than the longest."""
    for (few, high), (many, low) in pairwise(_BITS_BY_STEPS):
        if steps <= many:
            return high + (low - high) * max(0.0, math.log(steps / few)) / math.log(many / few)
    return _BITS_BY_STEPS[-1][1]


def _pass_seconds(dtype: torch.dtype, rows: int, columns: int) -> float:
    """Seconds of a forward and a backward pass of the quickstart's model: the better of two, after one to warm up."""
    model = initial_decoder(ModelConfig(vocab_size=4096, **PRESETS["qwen3-1m"]), seed=0).train()
    tokens_BT = torch.zeros(rows, columns, dtype=torch.long)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            hidden_BTD = model.hidden(tokens_BT)
            loss = linear_cross_entropy(hidden_BTD.flatten(0, 1), model.head_weight, tokens_BT.flatten())
        loss.backward()
        times.append(time.perf_counter() - start)
    return min(times[1:])
