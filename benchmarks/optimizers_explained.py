"""Why plain gradient descent loses on text: optimizers between it and AdamW, and what gradients look like.

AdamW divides every weight's gradient by that weight's usual size. Here the size is shared by a whole tensor, or by a row of the
table of tokens: as much of AdamW as is needed to tell which of the differences between gradients SGD suffers from.

Shapes: S sequences, T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import Optimizer

from bessemer.model.decoder import Decoder
from bessemer.tokenization.shards import TokenShards
from bessemer.training.data.batch import Batch
from bessemer.training.objectives import next_token_loss

BETAS, EPS = (0.9, 0.95), 1e-8
#: Parts of the held-out targets by how often a token occurs in training, each with as many targets.
PARTS = 5
#: Sequences whose gradients are compared.
SEQUENCES = 256


class SharedScale(Optimizer):
    """Adam without weight decay, whose mean of squared gradients is one number for all weights that share a scale.

    `shared` gives the dimensions of a tensor over which they share it.
    """

    def __init__(self, params: Any, shared: Callable[[Tensor, str], tuple[int, ...]], lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})
        self._shared = shared

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state, gradient = self.state[parameter], parameter.grad
                if gradient is None:
                    continue
                squares = gradient.square().mean(self._shared(parameter, group["role"]), keepdim=True)
                if not state:
                    state |= {"step": 0, "mean": torch.zeros_like(gradient), "square": torch.zeros_like(squares)}
                state["step"] += 1
                state["mean"].lerp_(gradient, 1 - BETAS[0])
                state["square"].lerp_(squares, 1 - BETAS[1])
                mean = state["mean"] / (1 - BETAS[0] ** state["step"])
                square = state["square"] / (1 - BETAS[1] ** state["step"])
                parameter.sub_(group["lr"] * mean / (square.sqrt() + EPS))


def scale_per_tensor(groups: list[dict[str, Any]]) -> Optimizer:
    """One scale for every tensor."""
    return SharedScale(groups, lambda parameter, role: tuple(range(parameter.ndim)))


def scale_per_token(groups: list[dict[str, Any]]) -> Optimizer:
    """One scale for every tensor, and in the table one for every token."""

    def shared(parameter: Tensor, role: str) -> tuple[int, ...]:
        return (1,) if role == "others" and parameter.ndim == 2 else tuple(range(parameter.ndim))

    return SharedScale(groups, shared)


def token_counts(shards: TokenShards) -> Tensor:
    """How often each token occurs in a stream, (V,)."""
    tokens = torch.from_numpy(shards.read(0, shards.tokens).astype("int64"))
    return torch.bincount(tokens, minlength=shards.vocab_size)


@torch.no_grad()
def loss_by_frequency(model: Decoder, windows: Tensor, counts_V: Tensor) -> list[float]:
    """Mean loss, in nats, of targets from the most frequent tokens to the rarest, in parts of as many targets.

    windows: (S, T + 1) tokens. counts_V: occurrences of each token in training.
    """
    losses, targets = [], []
    for rows in windows.split(8):
        logits = model(rows[:, :-1]).flatten(0, 1)
        losses.append(functional.cross_entropy(logits, rows[:, 1:].flatten(), reduction="none"))
        targets.append(rows[:, 1:].flatten())
    order = counts_V[torch.cat(targets)].argsort(descending=True, stable=True)
    return [float(part.mean()) for part in torch.cat(losses)[order].chunk(PARTS)]


def held_out_windows(shards: TokenShards, count: int, length: int) -> Tensor:
    """The first windows of a stream, (count, length + 1)."""
    stream = torch.from_numpy(shards.read(0, count * length + 1).astype("int64"))
    return stream.unfold(0, length + 1, length)


def gradient_statistics(model: Decoder, windows: Tensor, counts_V: Tensor) -> list[dict[str, Any]]:
    """For each kind of tensor, over the gradients of single sequences:

    size: the root mean square of the entries of their mean. noise: the root mean square of their deviations from it.
    kurtosis: the deviations' fourth power over their squared second, each averaged over sequences and summed over entries;
    3 for a normal distribution, about 1 / p for an entry that is nonzero in a share p of the sequences. Of several tensors of a
    kind the geometric mean. The table is split into the commonest 64 tokens and the rarer half of the vocabulary.
    """
    powers: dict[str, Tensor] = {}
    for row in windows[:SEQUENCES]:
        model.zero_grad()
        next_token_loss(model, Batch(row[None, :-1], row[None, 1:])).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            gradient = parameter.grad.double()
            summed = torch.stack([gradient, gradient**2, gradient**3, gradient**4]) / SEQUENCES
            powers[name] = powers.get(name, torch.zeros(())) + summed
    model.zero_grad()
    order = counts_V.argsort(descending=True)
    table = powers.pop("embed_tokens.weight")
    kinds = {
        "table, 64 commonest tokens": [table[:, order[:64]]],
        "table, rarer half of the tokens": [table[:, order[len(order) // 2 :]]],
    }
    for name, found in powers.items():
        kinds.setdefault(kind_of(name), []).append(found)
    return [{"kind": kind, **_moments(found)} for kind, found in kinds.items()]


def _moments(tensors: list[Tensor]) -> dict[str, float]:
    """The figures of `gradient_statistics` from the mean powers 1 to 4 of each tensor's gradients."""
    figures = []
    for mean, second, third, fourth in tensors:
        variance = (second - mean**2).clamp(min=0)
        central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
        kurtosis = central.sum() / variance.square().sum()
        figures.append(torch.stack([mean.square().mean().sqrt(), variance.mean().sqrt(), kurtosis]))
    size, noise, kurtosis = torch.stack(figures).log().mean(0).exp().tolist()
    return {"size": size, "noise": noise, "kurtosis": kurtosis}


def kind_of(name: str) -> str:
    """What a tensor is, without its layer's number."""
    last = name.removesuffix(".weight").split(".")[-1]
    return "norms" if last.endswith("norm") else last
