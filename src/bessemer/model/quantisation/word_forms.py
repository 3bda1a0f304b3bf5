"""Folders of AutoAWQ and of GPTQ, which are read: 4 bits by group, in words of eight codes.

A matrix `NAME.weight` (N, K) lies there transposed as `NAME.qweight`, with a zero and a scale of each group and output,
`NAME.qzeros` and `NAME.scales`. AWQ's words run along the outputs, in an order of their own (`_AWQ_PLACES`); GPTQ's run along
the inputs, those of the zeros along the outputs, and a zero is stored minus 1, unless the folder says `gptq_v2`. A weight is
scale · (code − zero), as of the scheme int4 with zeros of their own, in which it is kept: the numbers are the file's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bessemer.core.errors import ArtefactError
from bessemer.model.families.layout import Stored
from bessemer.model.quantisation.base import Scheme
from bessemer.model.quantisation.integers import pack
from bessemer.model.quantisation.schemes import Int4
from bessemer.model.quantisation.storage_parts import ReadForm, StoredPart

# Shapes: N outputs, K inputs, G groups of a row, W words.

#: Values of `quant_method`.
AWQ, GPTQ = "awq", "gptq"
#: Codes of a word.
_CODES = 8
#: The place in a word of each of eight neighbouring outputs, in AWQ's form for matrix products (`gemm`).
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
_IN_ORDER = tuple(range(_CODES))


def codes_of_words(words: Tensor, places: tuple[int, ...] = _IN_ORDER) -> Tensor:
    """Words (…, W) as codes 0 … 15, uint8 (…, 8 W). places: of each code within a word."""
    shifts = torch.tensor([4 * place for place in places], dtype=torch.int32)
    return ((words[..., None] >> shifts) & 15).to(torch.uint8).flatten(-2)


def _check(settings: Mapping[str, Any], path: Path) -> None:
    """Raise ArtefactError for variants of the two forms that are not read."""
    method, bits = settings["quant_method"], settings.get("bits", settings.get("w_bit"))
    reasons = {
        f"{bits} bits, and 4 are read": bits != 4,
        "AWQ's version gemv, and gemm is read": method == AWQ and str(settings.get("version", "gemm")).lower() != "gemm",
        "AWQ without zeros (zero_point: false)": method == AWQ and settings.get("zero_point", True) is not True,
        "GPTQ with desc_act, whose groups are no neighbours": method == GPTQ and bool(settings.get("desc_act")),
        "GPTQ with settings by module (dynamic)": bool(settings.get("dynamic")),
        "a quantised head (lm_head: true)": bool(settings.get("lm_head")),
    }
    found = next((reason for reason, applies in reasons.items() if applies), None)
    if found is not None:
        raise ArtefactError(f"{path}: the weights are quantised in a way that is not supported: {found}")


def _scheme(settings: Mapping[str, Any]) -> Int4:
    """The scheme of every quantised matrix."""
    size = settings.get("group_size", settings.get("q_group_size", 128))
    return Int4(size if isinstance(size, int) and size > 0 else None, "code")


def _is_left(settings: Mapping[str, Any], base: str) -> bool:
    """Whether a linear layer's matrix, by its name in the file without `.weight`, is not quantised."""
    if settings["quant_method"] == AWQ:
        return any(name in base for name in settings.get("modules_to_not_convert") or ())
    named = [name for group in settings.get("modules_in_block_to_quantize") or () for name in _listed(group)]
    return bool(named) and not any(base.endswith(f".{name}") for name in named)


def _listed(group: Any) -> list[str]:
    return [group] if isinstance(group, str) else list(group)


def _parts(
    one: Stored, module: str, scheme: Scheme, shape: tuple[int, ...], settings: Mapping[str, Any]
) -> Iterator[StoredPart]:
    """The tensors that take the place of `one`, a matrix of ours with this shape or rows of it.

    Raises ArtefactError for a matrix that is packed with others, or whose sides are not whole words.
    """
    if not one.is_rows:
        raise ArtefactError(
            f"{one.name}: packed of several matrices, of which {settings['quant_method']}'s form is not read here"
        )
    assert isinstance(scheme, Int4), scheme
    ours, view, is_awq = scheme.tensors(*shape), one.views[0].view, settings["quant_method"] == AWQ
    outputs, inputs = view(torch.empty(shape, device="meta")).shape
    groups = inputs // scheme.group_of(inputs)
    if outputs % _CODES or inputs % _CODES:
        raise ArtefactError(f"{one.name}: {outputs} outputs and {inputs} inputs, of which words of {_CODES} codes hold no rest")
    base, places = one.name.removesuffix(".weight"), _AWQ_PLACES if is_awq else _IN_ORDER
    stored_minus = 0 if is_awq or settings.get("checkpoint_format") == "gptq_v2" else 1

    def part(
        suffix: str, name: str, lengths: tuple[int, ...], dtype: torch.dtype, read: Callable[[Tensor], Tensor] | None
    ) -> StoredPart:
        made_of = (f"{module}.{name}", ours[name].shape)
        return StoredPart(f"{base}.{suffix}", *made_of, lengths, dtype, view, _not_written, read)

    words = (inputs, outputs // _CODES) if is_awq else (inputs // _CODES, outputs)
    yield part("qweight", "codes", words, torch.int32, partial(_read_codes, places=places, along_inputs=not is_awq))
    zeros = partial(_read_zeros, places=places, stored_minus=stored_minus)
    yield part("qzeros", "zeros", (groups, outputs // _CODES), torch.int32, zeros)
    yield part("scales", "scales", (groups, outputs), torch.float16, _read_scales)
    if not is_awq:
        # the group of every input, which are neighbours
        yield part("g_idx", "codes", (inputs,), torch.int32, None)


def _read_codes(words: Tensor, places: tuple[int, ...], along_inputs: bool) -> Tensor:
    codes_NK = codes_of_words(words.T, places) if along_inputs else codes_of_words(words, places).T
    return pack(codes_NK.contiguous())


def _read_zeros(words_GW: Tensor, places: tuple[int, ...], stored_minus: int) -> Tensor:
    return ((codes_of_words(words_GW, places) + stored_minus) & 15).T.contiguous()


def _read_scales(scales_GN: Tensor) -> Tensor:
    return scales_GN.T.float().contiguous()


def _not_written(tensor: Tensor) -> Tensor:
    raise AssertionError("folders are written in the form of compressed-tensors")


#: Of both.
WORDS = ReadForm(_check, _scheme, _is_left, _parts)
