"""Folders of 8 bits that `bitsandbytes` makes (`load_in_8bit`), which are read: LLM.int8 (Dettmers et al. 2022, arXiv
2208.07339).

A matrix `NAME.weight` (N, K) is int8, row by row, with the largest magnitude of each row, `NAME.SCB` (N,): weight = code · SCB
/ 127. There activations become int8 too, but for inputs with outliers. Here the weights are kept in the scheme int8, and the
kernels round a row's scale to float16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bessemer.core.errors import ArtefactError
from bessemer.model.families.layout import Stored, whole
from bessemer.model.quantisation.base import Scheme
from bessemer.model.quantisation.integers import LARGEST_INT8
from bessemer.model.quantisation.schemes import Int8
from bessemer.model.quantisation.storage_parts import ReadForm, StoredPart

_HEAD = "lm_head"


def is_skipped(settings: Mapping[str, Any], base: str) -> bool:
    """Whether bitsandbytes leaves a linear layer, by its name in the file, as it is: its name, or the beginning or the end of
    it, is listed, as in transformers."""
    skipped = settings.get("llm_int8_skip_modules") or [_HEAD]
    return any(base == skip or base.startswith(f"{skip}.") or base.endswith(f".{skip}") for skip in skipped)


def _check(settings: Mapping[str, Any], path: Path) -> None:
    """There is one variant."""


def _scheme(settings: Mapping[str, Any]) -> Int8:
    return Int8()


def _parts(
    one: Stored, module: str, scheme: Scheme, shape: tuple[int, ...], settings: Mapping[str, Any]
) -> Iterator[StoredPart]:
    """The tensors that take the place of `one`, a matrix of ours with this shape or rows of it.

    Raises ArtefactError for a matrix that is packed with others.
    """
    if not one.is_rows:
        raise ArtefactError(f"{one.name}: packed of several matrices, of which bitsandbytes' form is not read here")
    ours, view = scheme.tensors(*shape), one.views[0].view
    outputs, inputs = view(torch.empty(shape, device="meta")).shape
    base = one.name.removesuffix(".weight")
    codes, scales = ((f"{module}.{name}", ours[name].shape) for name in ("codes", "scales"))
    yield StoredPart(one.name, *codes, (outputs, inputs), torch.int8, view, whole, whole)
    yield StoredPart(f"{base}.SCB", *scales, (outputs,), torch.float32, view, _not_written, _scales)
    # the order of the codes, of which only rows are saved
    yield StoredPart(f"{base}.weight_format", *codes, (), torch.uint8, view, _not_written, None)


def _scales(largest_N: Tensor) -> Tensor:
    return (largest_N.float() / LARGEST_INT8)[:, None]


def _not_written(tensor: Tensor) -> Tensor:
    raise AssertionError("folders are written in the form of compressed-tensors")


#: Beside nf4, which is written too.
LLM_INT8 = ReadForm(_check, _scheme, is_skipped, _parts)
