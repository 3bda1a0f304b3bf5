"""Changes to a model's computation, and how a text goes on with them: parts silenced, a state patched, a direction added.

A *patch* (activation patching: Vig et al. 2020; Meng et al. 2022) puts the residual stream of another prompt in place of this
one's, behind one layer and at the last token. *Steering* (Turner et al. 2023; Rimsky et al. 2024) adds the difference of the
mean states of two lists of prompts, there and at every token that comes after. Silenced layers and heads add nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bessemer.core.errors import RequestError
from bessemer.inspection.heads import without_heads
from bessemer.model.decoder import Decoder
from bessemer.model.layers.cache import DecoderCache

# Shapes: B batch, T time, D hidden, V vocabulary.


@dataclass(frozen=True)
class Patch:
    """The state behind a layer, (D,), that the prompt's last token gets."""

    layer: int
    state_D: Tensor


@dataclass(frozen=True)
class Steering:
    """What is added to the residual stream behind a layer, (D,), from the prompt's last token on."""

    layer: int
    direction_D: Tensor


@dataclass(frozen=True)
class Changes:
    """heads: (layer, head) that are silenced; layers: of which attention and feed-forward are."""

    heads: Sequence[tuple[int, int]] = ()
    layers: Sequence[int] = ()
    patch: Patch | None = None
    steering: Steering | None = None

    def check(self, model: Decoder) -> None:
        """Raises RequestError for a layer or head that the model has not."""
        ours = [one.layer for one in (self.patch, self.steering) if one is not None]
        for layer in [*self.layers, *(layer for layer, _ in self.heads), *ours]:
            check_layer(model, layer)
        with without_heads(model, self.heads):
            pass


class Continued(NamedTuple):
    """A token of a continuation, its probability, and the likeliest in its place: (id, probability), the best first. watched:
    the probability of the token that is watched, there; None: none is."""

    id: int
    probability: float
    likeliest: list[tuple[int, float]]
    watched: float | None


@dataclass
class _Step:
    """Whether the last token that is read now is one that patches and steering are for, and which of the two."""

    is_prompt: bool = True
    middle_BTD: dict[int, Tensor] = field(default_factory=dict)


def check_layer(model: Decoder, layer: int) -> None:
    """Raises RequestError for a layer that the model has not."""
    if not 0 <= layer < len(model.blocks):
        raise RequestError(f"there is no layer {layer}: the model has {len(model.blocks)}, counted from 0")


@torch.no_grad()
def state_behind(model: Decoder, layer: int, tokens: Sequence[int]) -> Tensor:
    """The residual stream behind a layer at a prompt's last token, (D,). Raises RequestError for an empty prompt and a layer
    that is not there."""
    check_layer(model, layer)
    if not tokens:
        raise RequestError("a prompt has no token")
    states: dict[int, Tensor] = {}
    cache = _cache(model, len(tokens))
    model.pre_norm_hidden(_row(model, tokens), cache=cache, keep=lambda place, hidden_BTD: states.update({place: hidden_BTD}))
    return states[layer + 1][0, -1].clone()


def steering_between(
    model: Decoder, layer: int, towards: Sequence[Sequence[int]], away: Sequence[Sequence[int]], strength: float
) -> Steering:
    """Steering by `strength` times the mean state of some prompts less that of others, behind a layer at their last tokens."""
    means_D = [torch.stack([state_behind(model, layer, tokens) for tokens in prompts]).mean(0) for prompts in (towards, away)]
    return Steering(layer, strength * (means_D[0] - means_D[1]))


@torch.no_grad()
def continuation(
    model: Decoder,
    tokens: Sequence[int],
    count: int,
    changes: Changes | None = None,
    *,
    likeliest: int = 5,
    watched: int | None = None,
    ends: Callable[[int], bool] = lambda _: False,
) -> Iterator[Continued]:
    """The likeliest next tokens, one by one, at most `count` and to the first that `ends` the text, that one included.

    Raises RequestError for changes of what the model has not.
    """
    changes = changes or Changes()
    changes.check(model)
    cache, step, new = _cache(model, len(tokens) + count), _Step(), list(tokens)
    for _ in range(count):
        # entered for a step alone: between two tokens the caller may use the model otherwise
        with _changed(model, changes, step):
            hidden_BTD = model.pre_norm_hidden(_row(model, new), cache=cache)
        share_V = model.logits(model.normed(hidden_BTD[:, -1]))[0].float().softmax(-1)
        best = share_V.topk(min(likeliest, len(share_V)))
        pairs = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        yield Continued(*pairs[0], pairs, None if watched is None else float(share_V[watched]))
        if ends(pairs[0][0]):
            return
        step.is_prompt, new = False, [pairs[0][0]]


def _cache(model: Decoder, capacity: int) -> DecoderCache:
    return DecoderCache(model.config, 1, capacity, model.dtype, model.device)


def _row(model: Decoder, tokens: Sequence[int]) -> Tensor:
    return torch.tensor([list(tokens)], device=model.device)


@contextmanager
def _changed(model: Decoder, changes: Changes, step: _Step) -> Iterator[None]:
    """Inside the `with`, the model computes with the changes. The hooks are of a block's parts: its own are passed over where
    there is a cache."""
    with ExitStack() as stack:
        if changes.heads:
            stack.enter_context(without_heads(model, changes.heads))
        for layer in set(changes.layers):
            for norm in (model.blocks[layer].attention_output_norm, model.blocks[layer].feed_forward_output_norm):
                stack.callback(norm.register_forward_hook(_nothing).remove)
        patch, steering = changes.patch, changes.steering
        if patch is not None and step.is_prompt:
            _replace_behind(model, stack, step, patch.layer, lambda _: patch.state_D)
        if steering is not None:
            _replace_behind(model, stack, step, steering.layer, lambda state_D: state_D + steering.direction_D)
        yield


def _nothing(norm: nn.Module, given: tuple[Any, ...], out_BTD: Tensor) -> Tensor:
    return torch.zeros_like(out_BTD)


def _replace_behind(model: Decoder, stack: ExitStack, step: _Step, layer: int, replaced: Callable[[Tensor], Tensor]) -> None:
    """Hooks that change the state behind a layer at the last token, by what its feed-forward adds."""
    block = model.blocks[layer]
    multiplier = block.residual_multiplier

    def keep(norm: nn.Module, given: tuple[Tensor, ...]) -> None:
        step.middle_BTD[layer] = given[0]

    def add(norm: nn.Module, given: tuple[Any, ...], out_BTD: Tensor) -> Tensor:
        out_BTD, middle_D = out_BTD.clone(), step.middle_BTD[layer][0, -1]
        state_D = middle_D + out_BTD[0, -1] * multiplier
        out_BTD[0, -1] = (replaced(state_D) - middle_D) / multiplier
        return out_BTD

    stack.callback(block.post_attention_layernorm.register_forward_pre_hook(keep).remove)
    stack.callback(block.feed_forward_output_norm.register_forward_hook(add).remove)
