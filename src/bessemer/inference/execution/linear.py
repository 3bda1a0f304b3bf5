"""Storage forms of a model's weights, and how each is multiplied."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bessemer.model.cpu_kernels.arithmetic import kernels_arithmetic
from bessemer.model.cpu_kernels.packed_products import packed_products
from bessemer.model.decoded_products import decoded_products
from bessemer.model.decoder import Decoder
from bessemer.model.quantised_linear import PackedMatmuls

#: Rows up to which one of PyTorch's threads is fastest, where the kernels' threads do the matmuls.
_FEW_ROWS = 64


class OwnWeights:
    """The weights are the model's own, so changes by a trainer take effect at once."""

    matmuls = PackedMatmuls({})
    own_threads = False

    @property
    def arithmetic(self) -> Sequence[str]:
        return ()

    def is_soon_done(self, rows: int, *, invariant: bool) -> bool:
        return False

    def weights_changed(self) -> None:
        pass


class PackedCodes:
    """Codes of quantised layers, packed for the compiled CPU kernels: products with activations of 8 bits."""

    own_threads = True

    def __init__(self, model: Decoder, threads: int, *, release: bool = False) -> None:
        """release: the model gives up its own codes."""
        self._model, self._threads, self._releases = model, threads, release
        self.weights_changed()

    @property
    def arithmetic(self) -> Sequence[str]:
        return [f"products by compiled kernels ({kernels_arithmetic()}), activations of 8 bits"]

    def is_soon_done(self, rows: int, *, invariant: bool) -> bool:
        # chunks are few rows, and the number of threads may not depend on the batch
        return invariant or rows <= _FEW_ROWS

    def weights_changed(self) -> None:
        self.matmuls = packed_products(self._model, self._threads, release=self._releases)


class DequantisedWeights:
    """Weights of quantised layers, read out of their codes once."""

    own_threads = False

    def __init__(self, model: Decoder, dtype: torch.dtype) -> None:
        self._model, self.dtype = model, dtype
        self.weights_changed()

    @property
    def arithmetic(self) -> Sequence[str]:
        return [f"quantised weights read out of their codes once ({str(self.dtype).removeprefix('torch.')})"]

    def is_soon_done(self, rows: int, *, invariant: bool) -> bool:
        # one row meets weights in half precision on one thread anyhow
        return self.dtype == torch.float16 and not invariant and rows == 1

    def weights_changed(self) -> None:
        self.matmuls = decoded_products(self._model, self.dtype)
