"""Low-rank adapters that are trained: parts of the model beside its frozen linear layers, with parameters of their own.

    y = W x + s · B (A x)          A: (R, K), drawn uniformly in ±1/√K;   B: (N, R), zeros (Hu et al. 2021)
    y = m ⊙ (W x + s · B (A x)) / ‖W + s · B A‖      m: (N,), the norms of W's rows (Liu et al. 2024, DoRA)

So an adapter changes nothing before its first step. The norm of DoRA is a constant to the gradient (Liu et al. 2024, 4.3). W
may be kept in codes of 8 or 4 bits (Dettmers et al. 2023, QLoRA): no gradient is taken of it, and the gradient of its inputs
goes through what the codes stand for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn import functional

from bessemer.core.config import nearest
from bessemer.core.errors import ConfigError
from bessemer.core.hashing import derive_seed
from bessemer.model.adapters import CHILD, Adapter, Update, row_norms, weight_of
from bessemer.model.adapters import is_of_adapter as is_of_adapter
from bessemer.model.adapters.folder import adaptable_layers
from bessemer.model.decoder import Decoder
from bessemer.model.initialisation import fill
from bessemer.model.quantisation.quantised_decoder import dequantised_tensors
from bessemer.model.storage.folder import SCORE
from bessemer.model.vision.trained import empty_like

# Shapes: N outputs, K inputs, R rank.


class LowRankUpdate(nn.Module):
    """s · B (A x), added to what a linear layer gives for x. magnitude: with the norms of the rows of the sum (DoRA)."""

    def __init__(
        self,
        outputs: int,
        inputs: int,
        rank: int,
        scale: float,
        dropout: float,
        device: torch.device,
        *,
        magnitude: bool = False,
    ) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, inputs, device=device))
        self.up = nn.Parameter(torch.zeros(outputs, rank, device=device))
        self.magnitude = nn.Parameter(torch.ones(outputs, device=device)) if magnitude else None
        self.scale = scale
        self.dropout = dropout
        self.is_on = True

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, K) to (…, N)."""
        seen = functional.dropout(hidden, self.dropout, self.training) if self.dropout else hidden
        return functional.linear(functional.linear(seen, self.down), self.up) * self.scale

    def as_update(self, tensors: Mapping[str, Tensor] | None = None) -> Update:
        """As the engine takes it. tensors: others by the parameters' names; else its own, without gradients."""
        own = {name: parameter.detach() for name, parameter in self.named_parameters()} if tensors is None else tensors
        return Update(own["down"], own["up"], self.scale, own.get("magnitude"))

    def extra_repr(self) -> str:
        """Text in torch's printed module."""
        return f"rank={self.down.shape[0]}, scale={self.scale:g}"


def add_adapters(
    model: Decoder,
    *,
    rank: int,
    scale: float,
    dropout: float = 0.0,
    patterns: Sequence[str] = (),
    magnitude: bool = False,
) -> dict[str, LowRankUpdate]:
    """Freeze a model and give its linear layers updates to train, in place; returns them by the layers' names.

    They lie where their layers do and in float32, and are to be initialised. patterns: of the layers' names or of their last
    part; none: all that an adapter can change. Raises ConfigError for a pattern that no layer matches.
    """
    layers = adaptable_layers(model)
    chosen = matching_layers(layers, patterns)
    model.requires_grad_(False)
    for name in chosen:
        outputs, inputs = layers[name]
        layer = model.get_submodule(name)
        device = next(iter((*layer.parameters(), *layer.buffers()))).device
        update = LowRankUpdate(outputs, inputs, rank, scale, dropout, device, magnitude=magnitude)
        layer.add_module(CHILD, update.train(layer.training))
        layer.register_forward_hook(_add_update)
    return adapters_of(model)


def modules_of(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """The modules whose name, or its last part, matches one of the patterns, but for parts of an adapter in training."""
    named = ((name, module) for name, module in model.named_modules() if name and CHILD not in name.split("."))
    return {name: module for name, module in named if any(_matches(name, pattern) for pattern in patterns)}


def train_whole(model: Decoder, patterns: Sequence[str]) -> None:
    """Let the parameters of some modules be trained beside a model's adapter, in place: `peft`'s modules_to_save.

    patterns: of the modules' names or of their last part. Raises ConfigError for one that no module with parameters of its own
    matches, and for a layer that has an update, or whose weight is codes.
    """
    updates = adapters_of(model)
    for pattern in patterns:
        chosen = modules_of(model, [pattern])
        if clash := next((name for name in chosen if name in updates), None):
            raise ConfigError(
                f"adapter.modules_to_save: {clash} has a low-rank update already; leave it out there, or in adapter.modules"
            )
        parameters = [parameter for module in chosen.values() for parameter in module.parameters(recurse=False)]
        if not parameters:
            known = [*dict.fromkeys(name.rpartition(".")[2] for name, _ in model.named_modules())]
            raise ConfigError(
                f"adapter.modules_to_save: no module with weights of its own is called {pattern!r}{nearest(pattern, known)}"
            )
        for parameter in parameters:
            parameter.requires_grad_(True)


#: A pattern that stands for all linear layers that an adapter may change, as in `peft`.
ALL_LINEAR = "all-linear"


def matching_layers(layers: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The layers whose name, or its last part, matches a pattern; all where there are no patterns, or one is `all-linear`.
    Raises ConfigError for a pattern that no layer matches."""
    layers = list(layers)
    for pattern in patterns:
        if pattern != ALL_LINEAR and not any(_matches(name, pattern) for name in layers):
            known = [*dict.fromkeys(name.rpartition(".")[2] for name in layers), ALL_LINEAR]
            names = f"{nearest(pattern, known)} (there are {', '.join(known)})"
            raise ConfigError(f"adapter.modules: no linear layer is called {pattern!r}{names}")
    if not patterns or ALL_LINEAR in patterns:
        return layers
    return [name for name in layers if any(_matches(name, pattern) for pattern in patterns)]


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[2], pattern)


def _add_update(layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
    update = layer.get_submodule(CHILD)
    assert isinstance(update, LowRankUpdate)
    if not update.is_on:
        return out
    out = out + update(inputs[0]).to(out.dtype)
    if update.magnitude is None:
        return out
    sum_NK = weight_of(layer) + update.scale * update.up.detach() @ update.down.detach()
    gain_N = (update.magnitude / row_norms(sum_NK)).to(out.dtype)
    bias_N = layer._parameters.get("bias")
    return out * gain_N if bias_N is None else (out - bias_N) * gain_N + bias_N


def adapters_of(model: nn.Module) -> dict[str, LowRankUpdate]:
    """The updates in training, by the names of their layers; empty for a model without an adapter."""
    ending = f".{CHILD}"
    return {name.removesuffix(ending): part for name, part in model.named_modules() if isinstance(part, LowRankUpdate)}


def initial_update(name: str, inputs: int, rank: int, seed: int) -> Tensor:
    """A of the layer of a name, (R, K) float32: each draws from a generator of its own, so that all layouts begin alike."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "adapter", name))
    return torch.empty(rank, inputs).uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)


def initial_tensors(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """The tensors of a model's new updates by their names in it. With magnitudes, the model has its weights."""
    tensors = {}
    for layer, update in adapters_of(model).items():
        rank, inputs = update.down.shape
        tensors[f"{layer}.{CHILD}.down"] = initial_update(layer, inputs, rank, seed)
        tensors[f"{layer}.{CHILD}.up"] = torch.zeros(update.up.shape)
        if update.magnitude is not None:
            tensors[f"{layer}.{CHILD}.magnitude"] = row_norms(weight_of(model, layer).float())
    return tensors


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """While entered, the model is what it was before its adapter."""
    updates = adapters_of(model).values()
    for update in updates:
        update.is_on = False
    try:
        yield
    finally:
        for update in updates:
            update.is_on = True


def is_trained_by_adapter(name: str) -> bool:
    """Whether a tensor is trained where an adapter is: one of the adapter's, or the scalar head, by its name."""
    return is_of_adapter(name) or name == SCORE


def adapter_of(model: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> Adapter:
    """The adapter in training, as the engine takes it and a folder holds it; its tensors are the model's own.

    tensors: others by the parameters' names, such as those of a checkpoint; those of modules trained whole are then the
    adapter's too, and else are the model's alone.
    """
    updates = adapters_of(model)
    if tensors is None:
        return Adapter({name: update.as_update() for name, update in updates.items()})
    whole = {name: tensor for name, tensor in tensors.items() if not is_trained_by_adapter(name)}
    given = {
        name: {part: tensors[f"{name}.{CHILD}.{part}"] for part, _ in update.named_parameters()}
        for name, update in updates.items()
    }
    return Adapter({name: update.as_update(given[name]) for name, update in updates.items()}, whole=whole)


@contextmanager
def merged_in_place(model: nn.Module) -> Iterator[None]:
    """While entered, every weight that the adapter changes has its update in it, and the adapter is off; then W is there again,
    the same bits. Memory: a second copy of these weights, for as long. Of a model in one process whose weights are no codes."""
    changed = [(model.get_parameter(f"{name}.weight"), update) for name, update in adapter_of(model).updates.items()]
    before = [weight.data for weight, _ in changed]
    with without_adapters(model):
        try:
            for weight, update in changed:
                weight.data = update.on(weight.data)
            yield
        finally:
            for (weight, _), weight_NK in zip(changed, before, strict=True):
                weight.data = weight_NK


@torch.no_grad()
def merge_into(model: nn.Module, adapter: Adapter) -> None:
    """Add an adapter's updates to the weights of a model in one process, in place."""
    for name, update in adapter.updates.items():
        weight = model.get_parameter(f"{name}.weight")
        weight.copy_(update.on(weight))


@torch.no_grad()
def merged(model: Decoder, adapter: Adapter) -> Decoder:
    """A decoder of its own with the update in every weight that an adapter changes, in the weights' type, and else with the
    model's tensors; codes are dequantised, and matrices that lie in half precision in a model that does not are widened. An
    adapter in training is left out: pass `adapter_of(model)`."""
    weights = {
        name: tensor.to(torch.promote_types(tensor.dtype, model.dtype)) if tensor.is_floating_point() else tensor
        for name, tensor in dequantised_tensors(model).items()
        if not is_of_adapter(name)
    }
    for layer, update in adapter.updates.items():
        weights[f"{layer}.weight"] = update.on(weights[f"{layer}.weight"])
    for name, tensor in adapter.whole.items():
        weights[name] = tensor.to(weights[name].device, weights[name].dtype)
    return fill(empty_like(model), weights).to(model.device)


def without_parts_beside(model: Decoder) -> Decoder:
    """A model in training for an engine, whose kernels read weights and no parts beside them: itself, or with its adapter
    merged."""
    return merged(model, adapter_of(model)) if adapters_of(model) else model
