"""Records of a model's forward pass: attention, experts, residual stream; and the logit lens of a record.

A recorded forward has the same result bit for bit. The logit lens (nostalgebraist 2020) predicts the next token from the
residual stream after each layer, as if the model ended there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bessemer.core.errors import RequestError
from bessemer.model.decoder import Decoder
from bessemer.model.layers.attention_backends import AttentionBackend, Scores, attention_weights
from bessemer.model.layers.attention_mask import AttentionMask
from bessemer.model.layers.feed_forward import Routing, SparseFeedForward

# Shapes: B batch, T time, D hidden, H query heads, K key-value heads, C channels of a head, V channels of a value head,
# k experts of a token.


class HeadsRecord(NamedTuple):
    """The heads of one layer: what goes into the softmax, and what comes out. float32 arrays.

    query_BHTC, key_BKTC: normed and turned by their positions. weights_BHTT: from each query (row) to each key; a row sums
    to 1, less what a sink takes. attended_BHTV: the weighted sums of values. mask, scores: the mask, and the scaling.
    """

    query_BHTC: np.ndarray
    key_BKTC: np.ndarray
    value_BKTV: np.ndarray
    weights_BHTT: np.ndarray
    attended_BHTV: np.ndarray
    mask: AttentionMask
    scores: Scores


class ExpertsRecord(NamedTuple):
    """The experts that each token chose in one layer, and their weights, both (B, T, k); the heaviest first."""

    experts_BTk: np.ndarray
    weights_BTk: np.ndarray


@dataclass
class Recording:
    """The last forward, by layer; a layer of linear attention has no `heads`, a dense one no `experts`.

    residual: the residual stream, (B, T, D), after the embedding and then after each block, so one more than layers; of the
    last forward without a cache.
    """

    heads: dict[int, HeadsRecord] = field(default_factory=dict)
    residual: list[np.ndarray] = field(default_factory=list)
    experts: dict[int, ExpertsRecord] = field(default_factory=dict)


@contextmanager
def recording(model: Decoder) -> Iterator[Recording]:
    """Record the forwards inside the `with`. The model's own backend computes the results; weights are computed once more."""
    recorded, blocks = Recording(), model.blocks
    with ExitStack() as stack:
        for layer, block in enumerate(blocks):
            attention = block.attention
            if attention.backend is not None:
                stack.callback(setattr, attention, "backend", attention.backend)
                attention.backend = _recorded(attention.backend, layer, recorded)
            if isinstance(block.mlp, SparseFeedForward):
                keep, shape_again = _keep_experts(layer, recorded)
                stack.callback(block.mlp.router.register_forward_hook(keep).remove)
                stack.callback(block.mlp.register_forward_hook(shape_again).remove)
            stack.callback(block.register_forward_hook(partial(_keep_residual, recorded)).remove)
        stack.callback(blocks[0].register_forward_pre_hook(partial(_begin_residual, recorded)).remove)
        yield recorded


def record(model: Decoder, tokens: Sequence[int] | np.ndarray) -> Recording:
    """Run one text, or a batch of equally long ones, and return the record. Without gradients, in evaluation mode.

    Raises RequestError when there is no token, one is outside the vocabulary, or the model reads no text of this length.
    """
    with recording(model) as recorded:
        read(model, tokens)
    return recorded


@torch.no_grad()
def read(model: Decoder, tokens: Sequence[int] | np.ndarray) -> Tensor:
    """States after the last norm of one text or a batch, (B, T, D). Raises as `record`."""
    ids = np.atleast_2d(np.asarray(tokens, np.int64))
    limit = model.config.max_position_embeddings
    if not ids.size:
        raise RequestError("there is no text to look at: it has no token")
    if ids.min() < 0 or ids.max() >= model.config.vocab_size:
        raise RequestError(f"token id {ids.max()} is outside the model's vocabulary of {model.config.vocab_size:,} tokens")
    if ids.shape[1] > limit and model.config.rope_scaling.rope_type != "dynamic":
        raise RequestError(f"the text has {ids.shape[1]:,} tokens and the model reads {limit:,}; give a shorter one")
    was_training = model.training
    model.eval()
    try:
        return model.hidden(torch.from_numpy(ids).to(model.device))
    finally:
        model.train(was_training)


def as_array(tensor: Tensor) -> np.ndarray:
    """A tensor's numbers as a float32 array of their own."""
    return tensor.detach().to("cpu", torch.float32, copy=True).numpy()


def _recorded(backend: AttentionBackend, layer: int, recorded: Recording) -> AttentionBackend:
    def run(query_BHTC: Tensor, key_BKSC: Tensor, value_BKSV: Tensor, mask: AttentionMask, scores: Scores) -> Tensor:
        attended_BHTV = backend(query_BHTC, key_BKSC, value_BKSV, mask, scores)
        with torch.no_grad():
            weights_BHTS = attention_weights(query_BHTC, key_BKSC, mask, scores)
        query, key, value, weights, attended = map(as_array, (query_BHTC, key_BKSC, value_BKSV, weights_BHTS, attended_BHTV))
        recorded.heads[layer] = HeadsRecord(query, key, value, weights, attended, mask, scores)
        return attended_BHTV

    return run


def _keep_experts(layer: int, recorded: Recording) -> tuple[Any, Any]:
    """Hooks for a router, which sees all tokens in one row, and for the feed-forward around it, which sees the batch."""

    def keep(router: nn.Module, given: tuple[Any, ...], routing: Routing) -> None:
        weights_Nk, order = routing.weights_Nk.detach().sort(dim=-1, descending=True)
        recorded.experts[layer] = ExpertsRecord(routing.experts_Nk.gather(-1, order).cpu().numpy(), as_array(weights_Nk))

    def shape_again(feed_forward: nn.Module, given: tuple[Tensor], out_BTD: Tensor) -> None:
        experts, weights = recorded.experts[layer]
        shape = (*out_BTD.shape[:2], -1)
        recorded.experts[layer] = ExpertsRecord(experts.reshape(shape), weights.reshape(shape))

    return keep, shape_again


def _begin_residual(recorded: Recording, block: nn.Module, given: tuple[Any, ...]) -> None:
    recorded.residual[:] = [as_array(given[0])]


def _keep_residual(recorded: Recording, block: nn.Module, given: tuple[Any, ...], hidden_BTD: Tensor) -> None:
    recorded.residual.append(as_array(hidden_BTD))


# Shapes: L layers, and one for the embedding before them; T time, k tokens, D hidden, V vocabulary.


@dataclass(frozen=True)
class LogitLens:
    """Predictions from the residual stream after the embedding (first) and after each layer; the last are the model's own.

    tokens_LTk, probabilities_LTk: the likeliest next tokens. next_rank_LT: of the token that does come next, 1 is the
    likeliest; next_probability_LT: its probability; both without the last position.
    """

    tokens_LTk: np.ndarray
    probabilities_LTk: np.ndarray
    next_rank_LT: np.ndarray
    next_probability_LT: np.ndarray

    def losses(self) -> np.ndarray:
        """The model's loss at each token but the first, (T - 1,), nats."""
        return -np.log(np.maximum(self.next_probability_LT[-1], np.finfo(np.float32).tiny))


#: States of which the lens computes logits at once, unless a text alone has more.
_LENS_ROWS = 256


def logit_lens(model: Decoder, recording: Recording, tokens_T: np.ndarray, top: int = 5, row: int = 0) -> LogitLens:
    """softmax(head(norm(h))) of one recorded text, with h the residual stream after each layer."""
    following_T1 = torch.as_tensor(np.asarray(tokens_T[1:], np.int64))[:, None]
    tokens, probabilities, ranks, of_next = [], [], [], []
    for probabilities_TV in _lens_probabilities(model, [hidden_BTD[row] for hidden_BTD in recording.residual]):
        best = probabilities_TV.topk(min(top, probabilities_TV.shape[-1]), dim=-1)
        next_T1 = probabilities_TV[:-1].gather(1, following_T1)
        tokens.append(best.indices.numpy())
        probabilities.append(best.values.numpy())
        ranks.append(((probabilities_TV[:-1] > next_T1).sum(-1) + 1).numpy())
        of_next.append(next_T1[:, 0].numpy())
    return LogitLens(*map(np.stack, (tokens, probabilities, ranks, of_next)))


def _lens_probabilities(model: Decoder, hidden_LTD: list[np.ndarray]) -> Iterator[Tensor]:
    """The lens's probabilities (T, V) of each layer. Layers share products, which read the head once for several."""
    layers = max(1, _LENS_ROWS // len(hidden_LTD[0]))
    for first in range(0, len(hidden_LTD), layers):
        some = hidden_LTD[first : first + layers]
        logits_NV = lens_logits(model, np.concatenate(some)).float()
        yield from logits_NV.softmax(-1).cpu().unflatten(0, (len(some), -1))


@torch.no_grad()
def lens_logits(model: Decoder, hidden_TD: np.ndarray) -> Tensor:
    """The logits that the model's last norm and head make of states of the residual stream, (T, V)."""
    return model.logits(model.norm(torch.from_numpy(hidden_TD).to(model.device, model.dtype)))
