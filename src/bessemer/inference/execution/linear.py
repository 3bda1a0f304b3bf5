"""The storage forms of a model's weights: the modules' own, codes packed for the kernels, weights read out of their codes once.

Codes without a kernel, and those of models that no kernels pack, are read out once where memory holds them: to do it at each
product takes longer than all the rest.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch

from bessemer.core.environment import free_memory_bytes, memory_bytes
from bessemer.core.metrics import size
from bessemer.core.progress import PlainLines
from bessemer.inference.execution.backend import Linear
from bessemer.inference.execution.compiled_steps import CompiledSteps
from bessemer.model.cpu_kernels import kernels_arithmetic
from bessemer.model.cpu_kernels.packed_matmuls import bytes_for_kernels, describe_codes, faster_dtype, packed_products
from bessemer.model.decoder import Decoder
from bessemer.model.quantisation.quantised_decoder import decoded_bytes, decoded_products
from bessemer.model.quantisation.quantised_layers import PackedMatmuls, is_quantised, quantised_parts

#: Most rows for which PyTorch is fastest with one thread, where the kernels' own threads compute the matmuls.
_FEW_ROWS = 64


class OwnWeights:
    """A `Linear`: the weights are the model's own, so changes by a trainer take effect at once."""

    matmuls = PackedMatmuls({})
    own_threads = False

    @property
    def arithmetic(self) -> Sequence[str]:
        return ()

    def is_soon_done(self, rows: int, *, invariant: bool) -> bool:
        return False

    def weights_changed(self) -> None:
        pass


class PackedCodes(OwnWeights):
    """Codes of quantised layers, packed for the compiled CPU kernels: products with activations of 8 or 16 bits, or with floats
    where the kernels do not know the codes."""

    own_threads = True

    def __init__(self, model: Decoder, threads: int, *, activation_bits: int = 8, release: bool = False) -> None:
        """release: the model gives up its own codes."""
        self._model, self._threads, self._releases = model, threads, release
        self._activation_bits = activation_bits
        self._weights = describe_codes(model, activation_bits)
        self.weights_changed()

    @property
    def arithmetic(self) -> Sequence[str]:
        return [f"products by compiled kernels ({kernels_arithmetic()})", *self._weights]

    def is_soon_done(self, rows: int, *, invariant: bool) -> bool:
        # chunks are few rows, and the number of threads may not depend on the batch
        return invariant or rows <= _FEW_ROWS

    def weights_changed(self) -> None:
        self.matmuls = packed_products(
            self._model, self._threads, activation_bits=self._activation_bits, release=self._releases
        )


class DequantisedWeights(OwnWeights):
    """Weights of quantised layers, read out of their codes once."""

    def __init__(self, model: Decoder, dtype: torch.dtype | None) -> None:
        """dtype: as of `decoded_products`."""
        self._model, self.dtype = model, dtype
        self.weights_changed()

    @property
    def arithmetic(self) -> Sequence[str]:
        name, taken = str(self.dtype or self._model.dtype).removeprefix("torch."), size(decoded_bytes(self._model, self.dtype))
        return [f"quantised weights read out of their codes once ({name}, {taken} beside the codes)"]

    def is_soon_done(self, rows: int, *, invariant: bool) -> bool:
        # for one row of half-precision weights PyTorch uses one thread, so more threads gain nothing
        return self.dtype == torch.float16 and not invariant and rows == 1

    def weights_changed(self) -> None:
        self.matmuls = decoded_products(self._model, self.dtype)


class TritonCodes(OwnWeights):
    """Codes of quantised layers, multiplied as they lie by Triton kernels, on a GPU."""

    def __init__(self, model: Decoder) -> None:
        self._model = model
        self._unknown: list[str] = []
        self.weights_changed()

    @staticmethod
    def supports(model: Decoder) -> bool:
        """Whether there are kernels for a model's codes where it lies."""
        return model.device.type == "cuda" and is_quantised(model) and importlib.util.find_spec("triton") is not None

    @property
    def arithmetic(self) -> Sequence[str]:
        """As of `Linear`."""
        others = f", but for {', '.join(self._unknown)}, which PyTorch reads out at each product" if self._unknown else ""
        return [f"codes multiplied by Triton kernels{others}"]

    def weights_changed(self) -> None:
        """As of `Linear`."""
        from bessemer.model.quantisation.triton_products import gpu_products

        self.matmuls, self._unknown = gpu_products(self._model)


class StepsCodes(OwnWeights):
    """The codes that whole steps have packed, for sequences that go through the modules: much faster than to dequantise in
    every step."""

    def __init__(self, steps: CompiledSteps) -> None:
        self._steps = steps
        self.weights_changed()

    def weights_changed(self) -> None:
        self.matmuls = self._steps.matmuls()


#: Share of the free memory that dequantised weights may take beside the codes.
_SHARE_FOR_WEIGHTS = 0.5


def free_bytes(device: torch.device) -> int:
    """Free memory, as far as the system reports it; else half of what there is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = free_memory_bytes()
    return (memory_bytes() or 4 << 30) // 2 if free is None else free


def decoded_dtype(model: Decoder) -> torch.dtype | None:
    """The type to which the weights of a quantised model on a processor are dequantised once: where no kernels multiply by
    them, or would take longer: the faster type, or float16 where memory holds no other. None where they are not."""
    fastest = faster_dtype() if is_quantised(model) else None
    if fastest is None:
        return None
    return next((dtype for dtype in (fastest, torch.float16) if _holds(model, decoded_bytes(model, dtype))), None)


def _holds(model: Decoder, needed: int) -> bool:
    """Whether the memory of a model's device holds as many bytes of dequantised weights."""
    if model.device.type == "cpu" and free_memory_bytes() is None:
        return True
    return needed < _SHARE_FOR_WEIGHTS * free_bytes(model.device)


def without_kernels(model: Decoder, opened: bool) -> Linear:
    """The weights of a model that no kernels pack: codes on a GPU by kernels of its own; of a model that is served, dequantised
    once where memory holds them."""
    if TritonCodes.supports(model):
        return TritonCodes(model)
    if not opened or not is_quantised(model):
        return OwnWeights()
    needed = decoded_bytes(model, None)
    if _holds(model, needed):
        return DequantisedWeights(model, None)
    _say_slow(model, needed)
    return OwnWeights()


def holds_decoded(model: Decoder) -> bool:
    """Whether memory holds the weights that are decoded for the kernels, whose codes are given up for them one by one."""
    decoded = bytes_for_kernels(model)
    needed = sum(decoded.values())
    codes = sum(part.scheme.nbytes(*part.shape) for part in quantised_parts(model).values() if part.scheme.name in decoded)
    return not needed or _holds(model, needed - codes)


def _say_slow(model: Decoder, needed: int) -> None:
    PlainLines().say(
        f"  slow: every product reads weights out of their codes; kept read out they would take {size(needed)}, and "
        f"{size(free_bytes(model.device))} are free; take int8 or int4 (`bessemer quantize`), or more memory"
    )
