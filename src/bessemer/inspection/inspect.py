"""All results of `bessemer inspect` for a model and a text, as one value.

The embedding table is read as a space: nearest neighbours, analogies, and a map in two dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bessemer.core.errors import RequestError
from bessemer.core.store import new_file
from bessemer.inspection.heads import OpenedHead, head_losses, head_roles, open_head, repeated_tokens
from bessemer.inspection.recording import ExpertsRecord, LogitLens, logit_lens, record
from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.tokenization.tokenizer import Tokenizer

# Shapes: V vocabulary, D hidden, N vectors.
#: Rows of the table that are normed at a time, so that memory holds no second copy of it.
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

    Principal components by the singular value decomposition X - mean = U S Vᵀ: the coordinates are U S. Signs are
    chosen so that the largest entry of each direction is positive: the same vectors give the same map.
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


# Shapes: T tokens, L layers, H query heads, N tokens on the map.


@dataclass(frozen=True)
class Tokens:
    """A text in tokens. offsets: int64 (T, 2), the characters [start, end) of each; a begin token spans none."""

    ids: np.ndarray
    pieces: tuple[str, ...]
    offsets: np.ndarray


@dataclass(frozen=True)
class TokenMap:
    """Tokens in the plane: (N, 2), and the share of their variance that it keeps."""

    pieces: tuple[str, ...]
    coordinates_N2: np.ndarray
    share: float


@dataclass(frozen=True)
class Inspection:
    """The results of an inspection. Layers, heads and positions are counted from 0.

    attention: of each layer (H, T, T), None for linear attention. opened: one head step by step, None where no layer has
    attention weights. key: the chosen key position, if any. roles: (L, H) each, on random repeated
    sequences. head_changes_LH: the rise of the loss without each head, nats per token; None without ablation.
    experts: by sparse layer, (1, T, k). neighbours, analogies: by word and by formula.
    """

    config: ModelConfig
    text: str
    tokens: Tokens
    attention: tuple[np.ndarray | None, ...]
    lens: LogitLens
    opened: OpenedHead | None
    key: int | None
    roles: dict[str, np.ndarray]
    head_changes_LH: np.ndarray | None
    experts: dict[int, ExpertsRecord]
    neighbours: dict[str, Neighbours]
    analogies: dict[str, Neighbours]
    map: TokenMap
    # the text of every token id above
    pieces: dict[int, str] = field(repr=False)

    @property
    def loss(self) -> float | None:
        """The model's mean loss on the text, nats per token; None for a single token."""
        return float(self.lens.losses().mean()) if len(self.tokens.ids) > 1 else None

    def towards(self, query: int, key: int) -> np.ndarray:
        """The attention weight of every head from one position to another, (L, H); NaN in layers without attention weights."""
        heads = max((len(weights) for weights in self.attention if weights is not None), default=0)
        looks_LH = np.full((len(self.attention), heads), np.nan)
        for layer, weights in enumerate(self.attention):
            if weights is not None:
                looks_LH[layer] = weights[:, query, key]
        return looks_LH

    def arrays(self) -> dict[str, np.ndarray]:
        """All numbers by name, as `numpy.savez` takes them."""
        arrays = {"tokens": self.tokens.ids, "offsets": self.tokens.offsets}
        arrays |= {f"attention_{layer}": weights for layer, weights in enumerate(self.attention) if weights is not None}
        arrays |= {f"lens_{name}": getattr(self.lens, name) for name in LogitLens.__dataclass_fields__}
        arrays |= {f"role_{role}": scores for role, scores in self.roles.items()}
        if self.head_changes_LH is not None:
            arrays["head_changes"] = self.head_changes_LH
        if self.opened is not None:
            steps = {name: getattr(self.opened, name) for name in OpenedHead.__dataclass_fields__}
            arrays |= {f"head_{name}": np.asarray(value) for name, value in steps.items() if value is not None}
        for layer, experts in self.experts.items():
            arrays |= {f"experts_{layer}": experts.experts_BTk[0], f"expert_weights_{layer}": experts.weights_BTk[0]}
        for name, nearest in (self.neighbours | self.analogies).items():
            arrays |= {f"nearest {name}": nearest.tokens, f"cosines {name}": nearest.cosines}
        return arrays | {"map": self.map.coordinates_N2}


def inspect(
    model: Decoder,
    tokenizer: Tokenizer,
    text: str,
    *,
    layer: int | None = None,
    head: int | None = None,
    query: int | str = -1,
    key: int | str | None = None,
    neighbours_of: Sequence[str] = (),
    analogies: Sequence[str] = (),
    ablate: bool = True,
    roles: bool = True,
    top: int = 5,
    nearest: int = 10,
    seed: int = 0,
) -> Inspection:
    """Inspect a model's forward pass over a text.

    layer, head: the head that is opened; None: the one with the most attention from `query` to `key` (without a key, to any
    token but the first and the query itself). query, key: a position, or the text of a token that stands once
    in the text. neighbours_of: tokens; analogies: "one - less + more". ablate: also try the text without each head;
    roles: also score what heads look for.
    top: predictions of the lens; nearest: neighbours. seed: of the random sequences on which roles are scored.

    Raises RequestError for a text without tokens or too long, and for a head, token or word that does not exist.
    """
    tokens = tokenized(tokenizer, text)
    recorded = record(model, tokens.ids)
    attention = tuple(
        recorded.heads[index].weights_BHTT[0] if index in recorded.heads else None for index in range(len(model.blocks))
    )
    at, towards = find_token(tokens, query), None if key is None else find_token(tokens, key)
    opened = None
    if recorded.heads or layer is not None:
        chosen = _hardest(attention, at, towards, layer)
        if head is not None and layer is None:
            raise RequestError("a head is asked for without its layer; give both")
        opened = open_head(recorded, chosen[0], chosen[1] if head is None else head, at)
    near_words = {word: neighbours(model, token_id(tokenizer, word), nearest) for word in neighbours_of}
    solved = {formula: analogy(model, *_terms(tokenizer, formula), nearest) for formula in analogies}
    on_map = list(dict.fromkeys([*tokens.ids.tolist(), *(token_id(tokenizer, word) for word in neighbours_of)]))
    on_map = list(dict.fromkeys([*on_map, *(int(id) for near in near_words.values() for id in near.tokens)]))
    coordinates_N2, share = planar(vectors(model, on_map))
    lens = logit_lens(model, recorded, tokens.ids, top)
    shown = {*on_map, *lens.tokens_LTk.ravel().tolist(), *(int(id) for near in solved.values() for id in near.tokens)}
    pieces = {id: piece_of(tokenizer, id) for id in shown}
    return Inspection(
        model.config,
        text,
        tokens,
        attention,
        lens,
        opened,
        towards,
        head_roles_on_random_text(model, tokenizer, tokens, seed) if roles else {},
        head_losses(model, tokens.ids)[1] if ablate and len(tokens.ids) > 1 else None,
        recorded.experts,
        near_words,
        solved,
        TokenMap(tuple(pieces[id] for id in on_map), coordinates_N2, share),
        pieces,
    )


def tokenized(tokenizer: Tokenizer, text: str) -> Tokens:
    """A text in tokens, with those that the tokenizer puts around it."""
    ids, spans = tokenizer.encode_with_offsets(text)
    whole = tokenizer.encode(text)
    before = next(start for start in range(len(whole) - len(ids) + 1) if whole[start : start + len(ids)] == ids)
    after = len(whole) - before - len(ids)
    offsets = np.concatenate((np.zeros((before, 2), np.int64), spans, np.full((after, 2), len(text), np.int64)))
    return Tokens(np.array(whole, np.int64), tuple(piece_of(tokenizer, id) for id in whole), offsets)


def piece_of(tokenizer: Tokenizer, id: int) -> str:
    """The text of one token, control tokens included."""
    if id >= tokenizer.vocab_size:
        # a table may have more rows than there are tokens
        return f"⟨{id}⟩"
    return tokenizer.decode_bytes([id], skip_special=False, beginning=False).decode("utf-8", "replace")


def find_token(tokens: Tokens, token: int | str) -> int:
    """The position of a token, given by position or by its text. Raises RequestError when it is not there, or twice."""
    count = len(tokens.ids)
    if isinstance(token, str):
        places = [place for place, piece in enumerate(tokens.pieces) if piece == token]
        places = places or [place for place, piece in enumerate(tokens.pieces) if piece.strip() == token.strip()]
        if len(places) == 1:
            return places[0]
        if places:
            raise RequestError(f"{token!r} stands at positions {', '.join(map(str, places))}: name the position")
        if not token.strip().lstrip("-").isdigit():
            raise RequestError(f"no token of the text is {token!r}; its tokens are: {' '.join(map(repr, tokens.pieces))}")
        token = int(token)
    if not -count <= token < count:
        raise RequestError(f"there is no position {token}: the text has {count} tokens, counted from 0")
    return token % count


def token_id(tokenizer: Tokenizer, word: str) -> int:
    """The one token that a word is, as it stands or else after a space. Raises RequestError when it is several."""
    ways = [tokenizer.encode(text, add_bos=False) for text in (word, f" {word}")]
    for ids in ways:
        if len(ids) == 1:
            return ids[0]
    parts = " ".join(repr(piece_of(tokenizer, id)) for id in ways[0])
    raise RequestError(f"{word!r} is not one token but {len(ways[0])}: {parts}; only a token has a place in the embedding")


def _terms(tokenizer: Tokenizer, formula: str) -> tuple[int, int, int]:
    """The three tokens of "one - less + more", each as it stands in a text: after a space where that is one token."""
    one, minus, rest = formula.partition(" - ")
    less, plus, more = rest.partition(" + ")
    if not (minus and plus and one.strip() and less.strip() and more.strip()):
        raise RequestError(f'an analogy is written "king - man + woman", got {formula!r}')
    words = [word.strip() for word in (one, less, more)]
    spaced = [tokenizer.encode(f" {word}", add_bos=False) for word in words]
    return tuple(ids[0] if len(ids) == 1 else token_id(tokenizer, word) for word, ids in zip(words, spaced, strict=True))  # type: ignore[return-value]


def _hardest(attention: Sequence[np.ndarray | None], query: int, key: int | None, layer: int | None) -> tuple[int, int]:
    """The head, of one layer or of all, with the largest attention weight from a position to another."""
    keys = [key] if key is not None else range(1, query) if query > 1 else range(query + 1)
    looks = [
        (float(weights[head, query, list(keys)].max()), index, head)
        for index, weights in enumerate(attention)
        if weights is not None and layer in (None, index)
        for head in range(len(weights))
    ]
    return max(looks, key=lambda look: look[0])[1:] if looks else (layer or 0, 0)


def head_roles_on_random_text(model: Decoder, tokenizer: Tokenizer, tokens: Tokens, seed: int = 0) -> dict[str, np.ndarray]:
    """The roles of every head, each (L, H), on random tokens that are repeated. tokens: of a text that begins alike."""
    known = min(tokenizer.vocab_size, model.config.vocab_size)
    ids = [id for id in range(known) if not tokenizer.is_special(id)]
    begin = tokens.ids[: next((place for place, span in enumerate(tokens.offsets) if span[1]), 0)]
    length = min(25, (model.config.max_position_embeddings - len(begin)) // 2)
    return head_roles(model, repeated_tokens(ids, begin=begin.tolist(), length=length, seed=seed))


#: The least score of a head that is named after a role.
_NAMED = 0.4


def named_heads(model: Decoder, tokenizer: Tokenizer, seed: int = 0) -> dict[tuple[int, int], tuple[str, float]]:
    """What heads look for, measured on random tokens that are repeated: (layer, head) → the role with the highest score, and
    this; heads whose highest is below 0.4 have no name."""
    roles = head_roles_on_random_text(model, tokenizer, tokenized(tokenizer, "a"), seed)
    scores_RLH = np.nan_to_num(np.stack(list(roles.values())), nan=0.0)
    best_LH = scores_RLH.argmax(0)
    names = list(roles)
    return {
        (layer, head): (names[best_LH[layer, head]], float(scores_RLH[:, layer, head].max()))
        for layer, head in np.argwhere(scores_RLH.max(0) >= _NAMED).tolist()
    }


def save_arrays(inspection: Inspection, path: Path) -> None:
    """Write all numbers to one `.npz` file."""
    with new_file(path) as unfinished, unfinished.open("wb") as file:
        np.savez_compressed(file, **inspection.arrays())  # type: ignore[arg-type]
