"""The table of tokens' vectors, and tokens that are given as vectors."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

# Shapes: B batch, T time, D hidden, M tokens with vectors of their own.


class EmbeddedRows(NamedTuple):
    """Tokens that are given as vectors, in place of their rows of the embedding table: those of a picture.

    rows_M: their places among all B · T tokens, counted along the rows. vectors_MD: as they are, without the embedding
    multiplier.
    """

    rows_M: Tensor
    vectors_MD: Tensor

    def put_into(self, hidden_BTD: Tensor) -> Tensor:
        """The states of all tokens, (B, T, D), with these in their places."""
        vectors_MD = self.vectors_MD.to(hidden_BTD.dtype)
        return hidden_BTD.flatten(0, 1).index_copy(0, self.rows_M, vectors_MD).view_as(hidden_BTD)


class Embedding(nn.Embedding):
    """A table of vectors. On the meta device it draws no numbers: PyTorch loads its compiler for that, which takes seconds."""

    def reset_parameters(self) -> None:
        """Draw the numbers of a new table."""
        if not self.weight.is_meta:
            super().reset_parameters()
