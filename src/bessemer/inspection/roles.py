"""Roles of heads: attention to the token before, to the same token, to its last successor (induction), to the first token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bessemer.inspection.recording import Recording, read, recording
from bessemer.model.decoder import Decoder

# Shapes: B batch, T time, L layers, H query heads.

ROLES = ("previous_token", "same_token", "induction", "first_token")


def role_scores(weights_HTT: np.ndarray, tokens_T: np.ndarray) -> dict[str, np.ndarray]:
    """How far each head of a layer plays each role on one text: the mean attention, (H,), 0 … 1, of its queries to

    - previous_token: the token before;
    - same_token: earlier occurrences of the query's own token;
    - induction: the tokens after those (Elhage et al. 2021; Olsson et al. 2022), by which a sequence is continued as before;
    - first_token: the first token, where attention rests that has nothing to look for (Xiao et al. 2023).

    Queries for which there is no such key are left out; NaN where there is no query at all.
    """
    tokens_T = np.asarray(tokens_T)
    rows, columns = np.indices((len(tokens_T), len(tokens_T)))
    same_TT = (tokens_T[:, None] == tokens_T) & (columns < rows)
    looked_for = {
        "previous_token": columns == rows - 1,
        "same_token": same_TT,
        # the key after an earlier occurrence; the query itself is not one
        "induction": np.pad(same_TT, ((0, 0), (1, 0)))[:, :-1] & (columns < rows),
        "first_token": (columns == 0) & (rows > 0),
    }
    return {role: _mean_attention(weights_HTT, looked_for[role]) for role in ROLES}


def _mean_attention(weights_HTT: np.ndarray, keys_TT: np.ndarray) -> np.ndarray:
    queries_T = keys_TT.any(-1)
    if not queries_T.any():
        return np.full(len(weights_HTT), np.nan)
    return (weights_HTT * keys_TT).sum(-1)[:, queries_T].mean(-1)


def recorded_roles(found: Recording, tokens_BT: np.ndarray) -> dict[str, np.ndarray]:
    """The roles of every head on a recorded batch, each (L, H), the mean over its texts; NaN in layers without weights."""
    layers = len(found.residual) - 1
    heads = max((record.weights_BHTT.shape[1] for record in found.heads.values()), default=0)
    scores = {role: np.full((layers, heads), np.nan) for role in ROLES}
    for layer, record in found.heads.items():
        of_texts = [role_scores(*text) for text in zip(record.weights_BHTT, tokens_BT, strict=True)]
        for role in ROLES:
            scores[role][layer] = np.mean([of_text[role] for of_text in of_texts], axis=0)
    return scores


def head_roles(model: Decoder, tokens_BT: np.ndarray) -> dict[str, np.ndarray]:
    """The roles of every head on a batch of texts, each (L, H); NaN in layers of linear attention."""
    tokens_BT = np.atleast_2d(tokens_BT)
    with recording(model) as found:
        read(model, tokens_BT)
    return recorded_roles(found, tokens_BT)


def repeated_tokens(
    ids: Sequence[int], *, begin: Sequence[int] = (), texts: int = 4, length: int = 25, seed: int = 0
) -> np.ndarray:
    """Texts of random tokens that come twice in the same order, (B, T): all that can be known of the second half is that
    it repeats the first.

    ids: to draw from, without repetition; length: of one half, or as many as there are ids. begin: stands before each.
    """
    generator = np.random.default_rng(seed)
    halves = [generator.choice(np.asarray(ids), min(length, len(ids)), replace=False) for _ in range(texts)]
    return np.stack([np.concatenate((np.asarray(begin, np.int64), half, half)) for half in halves])


def strongest(scores_LH: np.ndarray, count: int = 5) -> list[tuple[int, int, float]]:
    """The heads with the highest scores: layer, head, score. NaN is passed over."""
    order = np.argsort(np.where(np.isnan(scores_LH), -np.inf, scores_LH), axis=None, kind="stable")[::-1]
    places = [divmod(int(place), scores_LH.shape[1]) for place in order[:count]]
    return [(layer, head, float(scores_LH[layer, head])) for layer, head in places if not np.isnan(scores_LH[layer, head])]
