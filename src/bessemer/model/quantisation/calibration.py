"""Calibration statistics: the inputs of each of a model's matrices on calibration text, block by block.

A block is given the outputs of the blocks before it, which are quantised already: so its codes can make up for their errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from bessemer.model.decoder import Decoder
from bessemer.model.layers.block import Block
from bessemer.model.layers.feed_forward import Experts, ExpertWeights, Gate

# Shapes: R rows of calibration text, B rows at a time, T time, D hidden, K inputs of a matrix, M vectors of inputs, E experts.

_TOKENS_AT_ONCE = 4096


class Statistics:
    """Sums over the inputs x of a matrix: x xᵀ, |x|, and their number."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.squares_KK = torch.zeros(inputs, inputs, device=device)
        self.magnitudes_K = torch.zeros(inputs, device=device)
        self.count = 0

    def add(self, hidden: Tensor) -> None:
        """Count inputs, (…, K)."""
        hidden_MK = hidden.detach().reshape(-1, hidden.shape[-1]).to(torch.float32)
        self.squares_KK.addmm_(hidden_MK.T, hidden_MK)
        self.magnitudes_K += hidden_MK.abs().sum(0)
        self.count += len(hidden_MK)

    def divided(self, scales_K: Tensor) -> Statistics:
        """The statistics of the inputs divided by scales."""
        scaled = Statistics(0, scales_K.device)
        scaled.squares_KK = self.squares_KK / torch.outer(scales_K, scales_K)
        scaled.magnitudes_K, scaled.count = self.magnitudes_K / scales_K, self.count
        return scaled


class Fed(NamedTuple):
    """A block, its inputs on calibration text, (B, T, D) each, and its other arguments."""

    name: str
    block: Block
    inputs: list[Tensor]
    others: tuple[tuple[Any, ...], dict[str, Any]]

    def run(self) -> list[Tensor]:
        """The block's outputs."""
        arguments, options = self.others
        return [self.block.forward(hidden_BTD, *arguments, **options) for hidden_BTD in self.inputs]


def fed_blocks(model: Decoder, rows_RT: Tensor) -> Iterator[Fed]:
    """The blocks in order, each with its inputs; a block's outputs are computed when the next is asked for."""
    size = max(1, min(len(rows_RT), _TOKENS_AT_ONCE // rows_RT.shape[1]))
    # all batches have one size, so the positions and masks of the first serve all
    batches = rows_RT[: len(rows_RT) // size * size].to(model.device).split(size)
    inputs, others = _inputs(model, batches)
    names = {module: name for name, module in model.named_modules()}
    for block in model.blocks:
        fed = Fed(names[block], block, inputs, others[block])
        yield fed
        inputs = fed.run()


class _ReachedError(Exception):
    """Ends a forward pass after the last block that is needed."""


def _inputs(model: Decoder, batches: Sequence[Tensor]) -> tuple[list[Tensor], dict[Block, Any]]:
    """Inputs of the first block for every batch, and the other arguments of each block."""
    inputs: list[Tensor] = []
    others: dict[Block, Any] = {}

    def first(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        inputs.append(arguments[0])
        if len(others) == len(model.blocks):
            raise _ReachedError

    def every(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        assert isinstance(module, Block)
        others[module] = (arguments[1:], options)

    with ExitStack() as stack:
        stack.callback(model.blocks[0].register_forward_pre_hook(first, with_kwargs=True).remove)
        for block in model.blocks:
            stack.callback(block.register_forward_pre_hook(every, with_kwargs=True).remove)
        for tokens_BT in batches:
            try:
                model.hidden(tokens_BT)
            except _ReachedError:
                continue
    return inputs, others


def steps_of(fed: Fed, names: Sequence[str]) -> list[list[str]]:
    """The matrices of a block in the order in which they are used; those that read the same input are one step.

    names: of linear layers, and of experts' matrices, as in the model. An expert that no token visits is there all the same.
    """
    called: list[tuple[int, str]] = []
    # keeps the inputs alive: an `id` is unique only among live objects
    kept: list[Tensor] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            kept.append(arguments[0])
            called.append((id(arguments[0]), name))

        return note

    with ExitStack() as stack:
        for name in names:
            local = name.removeprefix(f"{fed.name}.")
            parent = fed.block.get_submodule(local.rpartition(".")[0])
            if not isinstance(parent, Experts):
                stack.callback(fed.block.get_submodule(local).register_forward_pre_hook(hook(name)).remove)
            elif local.endswith("gate_up_proj"):
                stack.callback(parent.register_forward_pre_hook(hook(f"{fed.name}.{local}")).remove)
        fed._replace(inputs=fed.inputs[:1]).run()
    steps: dict[int, list[str]] = {}
    for identity, name in called:
        if name.endswith("experts.gate_up_proj"):
            steps[-identity], steps[-identity - 1] = [name], [name.replace("gate_up_proj", "down_proj")]
        else:
            steps.setdefault(identity, []).append(name)
    assert sorted(name for step in steps.values() for name in step) == sorted(names), (steps, names)
    return list(steps.values())


class InputStatistics(Protocol):
    """What is known of the inputs of a matrix."""

    def add(self, hidden: Tensor) -> None:
        """Count inputs, (…, K)."""


Kind = TypeVar("Kind", bound=InputStatistics)


def gather(fed: Fed, names: Sequence[str], kind: Callable[[int, torch.device], Kind]) -> dict[str, list[Kind]]:
    """The statistics of the inputs of some of a block's matrices: one, or one for each expert. kind: makes those of K
    inputs."""
    found: dict[str, list[Kind]] = {}
    device = fed.inputs[0].device
    with ExitStack() as stack:
        for name in names:
            local = name.removeprefix(f"{fed.name}.")
            outer = fed.block.get_submodule(local.rpartition(".")[0])
            if isinstance(outer, Experts):
                inputs = getattr(outer, local.rpartition(".")[2]).shape[-1]
                found[name] = [kind(inputs, device) for _ in range(outer.count)]
                up, down = (found.get(f"{name.rpartition('.')[0]}.{part}") for part in ("gate_up_proj", "down_proj"))
                stack.enter_context(_watched(outer, up, down))
                continue
            layer = fed.block.get_submodule(local)
            assert isinstance(layer, nn.Linear)
            found[name] = [kind(layer.in_features, device)]
            stack.callback(layer.register_forward_pre_hook(_counting(found[name][0])).remove)
        fed.run()
    return found


def _counting(statistics: InputStatistics) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda _, arguments: statistics.add(arguments[0])


@contextmanager
def _watched(experts: Experts, up: Sequence[InputStatistics] | None, down: Sequence[InputStatistics] | None) -> Iterator[None]:
    """Counts what goes into each expert's two matrices."""

    def backend(visits_VD: Tensor, sizes_E: Tensor, weights: ExpertWeights, gate: Gate) -> Tensor:
        outputs = []
        for expert, tokens in enumerate(visits_VD.split(sizes_E.tolist())):
            gate_up_bias, down_bias = (bias if bias is None else bias[expert] for bias in weights[2:])
            between = gate(functional.linear(tokens, weights.gate_up[expert], gate_up_bias))
            if up is not None:
                up[expert].add(tokens)
            if down is not None:
                down[expert].add(between)
            outputs.append(functional.linear(between, weights.down[expert], down_bias))
        return torch.cat(outputs)

    before, experts.backend = experts.backend, backend
    try:
        yield
    finally:
        experts.backend = before
