"""The embedding table as a space: nearest neighbours, analogies, and a map in two dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from bessemer.core.errors import RequestError
from bessemer.model.decoder import Decoder

# Shapes: V vocabulary, D hidden, N vectors.
# of the table, normed at a time: no second copy of it in memory
_ROWS = 1 << 14


class Neighbours(NamedTuple):
    """Tokens by falling cosine, and the cosines."""

    tokens: np.ndarray
    cosines: np.ndarray


def neighbours(model: Decoder, token: int, count: int = 10) -> Neighbours:
    """The tokens whose embeddings point most nearly in the same direction, the token itself left out.

    cos(a, b) = a · b / (|a| |b|). Raises RequestError for an id outside the vocabulary.
    """
    return _nearest(model, _unit(vectors(model, [token]))[0], count, [token])


def analogy(model: Decoder, one: int, less: int, more: int, count: int = 10) -> Neighbours:
    """The tokens nearest to one - less + more, of vectors of length 1 (Mikolov et al. 2013); the three are left out."""
    unit = _unit(vectors(model, [one, less, more]))
    return _nearest(model, unit[0] - unit[1] + unit[2], count, [one, less, more])


def vectors(model: Decoder, tokens: Sequence[int]) -> np.ndarray:
    """Embeddings of some tokens, (N, D) float32. Raises RequestError for an id outside the vocabulary."""
    table_VD = model.embed_tokens.weight.detach()
    for token in tokens:
        if not 0 <= token < len(table_VD):
            raise RequestError(f"token id {token} is outside the model's vocabulary of {len(table_VD):,} tokens")
    return table_VD[list(tokens)].float().cpu().numpy()


def planar(vectors_ND: np.ndarray) -> tuple[np.ndarray, float]:
    """Vectors in the plane in which they vary most, (N, 2), and the share of their variance that it keeps.

    Principal components through the singular value decomposition X - mean = U S Vᵀ: the coordinates are U S. Signs, which
    the decomposition leaves open, are such that the largest entry of each direction is positive: the same vectors give the
    same map.
    """
    centred_ND = np.asarray(vectors_ND, np.float64) - np.mean(vectors_ND, axis=0, dtype=np.float64)
    left_NN, singular_N, directions_ND = np.linalg.svd(centred_ND, full_matrices=False)
    coordinates_N2 = np.zeros((len(centred_ND), 2))
    for axis, direction_D in enumerate(directions_ND[:2]):
        sign = np.sign(direction_D[np.abs(direction_D).argmax()])
        coordinates_N2[:, axis] = sign * left_NN[:, axis] * singular_N[axis]
    total = np.square(singular_N).sum()
    return coordinates_N2, float(np.square(singular_N[:2]).sum() / total) if total else 1.0


def _nearest(model: Decoder, direction_D: np.ndarray, count: int, without: Sequence[int]) -> Neighbours:
    table_VD = model.embed_tokens.weight.detach()
    wanted = torch.from_numpy(_unit(direction_D[None])[0]).to(table_VD.device)
    pieces = [torch.nn.functional.normalize(rows.float(), dim=-1) @ wanted for rows in table_VD.split(_ROWS)]
    cosines_V = torch.cat(pieces).cpu()
    cosines_V[list(without)] = -torch.inf
    best = cosines_V.topk(min(count, len(cosines_V) - len(set(without))))
    return Neighbours(best.indices.numpy(), best.values.numpy())


def _unit(vectors_ND: np.ndarray) -> np.ndarray:
    return vectors_ND / np.maximum(np.linalg.norm(vectors_ND, axis=-1, keepdims=True), 1e-12)
