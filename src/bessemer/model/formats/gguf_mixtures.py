"""Which number type each tensor of a GGUF file has: one for all, or a K mixture, which gives more bits where they count.

The mixtures are llama.cpp's (`llama-quantize`): the head, and attention's values and the feed-forward's second matrix in the
first and last layers and in every third between, have two bits more than the others. Rows that are no multiple of 256 are kept
in a type of blocks of 32 with at least as many bits, and rows that are none of 32 in halves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

#: Tensors that llama.cpp wants in float32.
IN_FULL = ("ffn_gate_inp.weight", "position_embd.weight", ".bias")
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
#: Types of blocks of 256 → what rows of no multiple of 256 have instead.
_NARROWER = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_LAYER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class Mixture:
    """How a file's matrices are stored.

    matrices: the type of most. embedding, head: theirs. file_type: llama.cpp's number of the mixture. more: the type of the
    tensors that get more bits: in the layers of `_gets_more` (medium), or in the first ones only (small).
    """

    matrices: str
    embedding: str
    head: str
    file_type: int
    more: str | None = None
    is_small: bool = False


def _plain(kind: str, file_type: int, ends: str | None = None) -> Mixture:
    return Mixture(kind, ends or kind, ends or kind, file_type)


#: By the value of --dtype. The embedding has more than four bits, as in `llama-quantize`.
GGUF_DTYPES: Mapping[str, Mixture] = {
    "f32": _plain("F32", 0),
    "f16": _plain("F16", 1),
    "bf16": _plain("BF16", 32),
    "q8_0": _plain("Q8_0", 7),
    "q6_k": Mixture("Q6_K", "Q6_K", "Q6_K", 18),
    "q5_k_m": Mixture("Q5_K", "Q5_K", "Q6_K", 17, more="Q6_K"),
    "q5_k_s": Mixture("Q5_K", "Q5_K", "Q6_K", 16),
    "q4_k_m": Mixture("Q4_K", "Q4_K", "Q6_K", 15, more="Q6_K"),
    "q4_k_s": Mixture("Q4_K", "Q4_K", "Q6_K", 14, more="Q5_K", is_small=True),
    "q4_0": _plain("Q4_0", 2, "Q8_0"),
    "q4_1": _plain("Q4_1", 3, "Q8_0"),
}


@dataclass(frozen=True)
class TensorTypes:
    """The types of one file's tensors. layers: of the model. is_tied: the embedding is the head. experts: of a layer, or 0."""

    mixture: Mixture
    layers: int
    is_tied: bool
    experts: int = 0

    def of(self, name: str, shape: tuple[int, ...]) -> tuple[str, str | None]:
        """The type of a tensor, and the one that was wanted where rows of its length cannot have that."""
        if len(shape) < 2 or name.endswith(IN_FULL):
            return "F32", None
        wanted = self._wanted(name)
        if not wanted.startswith("Q"):
            return wanted, None
        kind = wanted
        if kind in _NARROWER and shape[-1] % 256:
            # llama.cpp gives the head whole bytes
            kind = "Q8_0" if self._is_head(name) else _NARROWER[kind]
        if shape[-1] % 32:
            kind = "F16"
        return kind, None if kind == wanted else wanted

    def _is_head(self, name: str) -> bool:
        return name == HEAD or (self.is_tied and name == EMBEDDING)

    def _wanted(self, name: str) -> str:
        mixture = self.mixture
        if self._is_head(name):
            return mixture.head
        if name == EMBEDDING:
            return mixture.embedding
        match = _LAYER.match(name)
        if match is None or not mixture.matrices.endswith("_K"):
            return mixture.matrices
        layer, part = int(match[1]), name.rpartition("blk.")[2].split(".")[1]
        if self.experts == 8 and part in ("attn_v", "attn_k"):
            # Mixtral: shared by eight experts, and small beside them
            return "Q8_0"
        if part == "attn_qkv" and mixture.more is not None and not mixture.is_small:
            return {"Q4_K": "Q5_K", "Q5_K": "Q6_K"}[mixture.matrices]
        if part == "attn_output" and self.experts == 8 and mixture.matrices == "Q4_K":
            return "Q5_K"
        is_finer = part in ("attn_v", "ffn_down", "ffn_down_exps", "ffn_down_shexp")
        if mixture.more is not None and is_finer and self._gets_more(layer, is_value=part == "attn_v"):
            return mixture.more
        return mixture.matrices

    def _gets_more(self, layer: int, *, is_value: bool) -> bool:
        eighth = self.layers // 8
        if self.mixture.is_small:
            return layer < (4 if is_value else eighth)
        return layer < eighth or layer >= 7 * self.layers // 8 or (layer - eighth) % 3 == 2
