"""Steps on a pretended device, run as a program of its own: PyTorch takes one such device for a whole process.

Its tensors have a device and shapes, and no numbers. Whoever asks one for a number, or makes a shape of its numbers, fails, as
does an operation on tensors of two devices; copies between the host and the device are counted. Prints, as JSON, the copies to
the device and to the host of a step of each kind.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from bessemer.inference.config import EngineConfig
from bessemer.inference.execution import batch as step_inputs
from bessemer.inference.execution.backend import Backend
from bessemer.inference.execution.batch import Batch
from bessemer.inference.execution.build import new_runner
from bessemer.inference.execution.cuda_graphs import StaticSteps
from bessemer.inference.execution.flex_attention import FlexPagesAttention
from bessemer.inference.execution.kv_cache import PagedMemory, layer_groups
from bessemer.inference.execution.linear import OwnWeights
from bessemer.inference.execution.runner import Runner
from bessemer.inference.sampling.device_sampler import SampledRows
from bessemer.inference.sampling.sampler import SamplingParams, SamplingState
from tests.inference.models import BASE, WINDOWS
from tests.inference.sampling_kinds import KINDS, VOCAB_SIZE
from tests.model.randomised import random_decoder

NAME = "pretended"
DEVICE = f"{NAME}:0"
ROWS = len(KINDS)


class Transfers(TorchDispatchMode):
    """Copies between the host and the device."""

    def __init__(self):
        super().__init__()
        self.to_device = self.to_host = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        out = function(*arguments, **(named or {}))
        devices = [one.device.type for one in arguments if isinstance(one, torch.Tensor)]
        if devices and isinstance(out, torch.Tensor):
            source = devices[1] if function is torch.ops.aten.copy_.default else devices[0]
            self.to_device += (source, out.device.type) == ("cpu", NAME)
            self.to_host += (source, out.device.type) == (NAME, "cpu")
        return out


def memory_of_the_host(size, device):
    """As `host_memory`. The tensor is a pretended one of the host, so that only the array holds numbers."""
    return np.zeros(size, np.uint8), torch.zeros(size, dtype=torch.uint8)


def moved(model):
    """A model whose weights say that they lie on the device."""
    for part in model.modules():
        for held, kind in ((part._parameters, torch.nn.Parameter), (part._buffers, lambda tensor: tensor)):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = kind(torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE))
    return model


def pages_in_place(query_BHTC, keys_PKMC, values_PKMV, mask, scores, window, slopes_H):
    return query_BHTC.new_empty(*query_BHTC.shape[:3], values_PKMV.shape[-1])


def gathered(model, memory):
    return new_runner(model, memory, EngineConfig(cpu_kernels="off"), opened=False)


def in_place(model, memory):
    return Runner(model, memory, Backend(OwnWeights(), FlexPagesAttention(memory, pages_in_place, model.dtype)))


def static(model, memory):
    steps = StaticSteps(model, memory, ROWS, FlexPagesAttention(memory, pages_in_place, model.dtype))
    return Runner(model, memory, Backend(OwnWeights(), FlexPagesAttention(memory, pages_in_place, model.dtype), steps))


CASES = {
    "gathered": ({}, gathered, {}),
    "gathered, windows": ({**WINDOWS, "sliding_window": 20}, gathered, {}),
    "gathered, alibi": ({"position_type": "alibi"}, gathered, {}),
    "in place": ({**WINDOWS, "sliding_window": 20}, in_place, {"by_head": True}),
    "static": ({**WINDOWS, "sliding_window": 20}, static, {"by_head": True, "spare": True}),
}


def sampled_rows(pending):
    states = [SamplingState(SamplingParams(seed=1, **own), prompt=[3, 4], vocab_size=VOCAB_SIZE) for own in KINDS.values()]
    for state in states:
        state.advance(5)
    return SampledRows(states, pending)


def transfers_of(changes, make, layout):
    """Of the second step: one token of each row, two of them of the step before, one new text read in other cases."""
    decoder = random_decoder(BASE.with_changes(vocab_size=VOCAB_SIZE, **changes))
    before, rows = sampled_rows({}), sampled_rows({5: 2, 6: 0})
    with FakeTensorMode():
        blocks = [64] * len(layer_groups(decoder.config))
        memory = PagedMemory(decoder.config, blocks, 8, torch.float32, DEVICE, **layout)
        runner = make(moved(decoder), memory)
        groups = len(memory.groups)

        def step(sampled, first, pending):
            batch = Batch.empty(groups)
            batch.append_tokens([1] * first, 2, [[0, 1, 2]] * groups, wanted=[first - 1], prompt_length=5)
            for row in range(1, ROWS):
                batch.append_tokens([2], 8 + row, [[4, 5 + row, 3]] * groups, wanted=[0], prompt_length=5)
            batch.pending |= {batch.starts[row]: place for row, place in pending.items()}
            return runner.sample(batch, sampled)

        first = 1 if make is static else 12
        step(before, first, {})
        with Transfers() as transfers:
            step(rows, first, {5: 2, 6: 0})
    return transfers.to_device, transfers.to_host


def check_the_pretence():
    """Waits for the device and copies would be noticed."""
    with FakeTensorMode(), Transfers() as transfers:
        logits_RV = torch.empty(2, 9, device=DEVICE)
        logits_RV.copy_(torch.empty(2, 9))
        logits_RV.cpu()
        for wait, error in (
            (lambda: logits_RV.tolist(), DataDependentOutputException),
            (lambda: bool((logits_RV == 1).all()), DataDependentOutputException),
            (lambda: logits_RV[logits_RV > 0], DynamicOutputShapeException),
            (lambda: logits_RV + torch.zeros(9), RuntimeError),
        ):
            try:
                wait()
            except error:
                continue
            raise AssertionError("nobody noticed a wait")
    assert (transfers.to_device, transfers.to_host) == (1, 1)


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend(NAME)
    step_inputs.host_memory = memory_of_the_host
    check_the_pretence()
    print(json.dumps({name: transfers_of(*case) for name, case in CASES.items()}))
