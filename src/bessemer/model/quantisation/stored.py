"""Codes in the files of a Hugging Face folder, in the form that the package `compressed-tensors` gave them.

A matrix `NAME.weight` is there as `NAME.weight_packed` (int32, several codes each, `pack-quantized`) or as `NAME.weight` (int8,
`int-quantized` where activations are quantised too, else `naive-quantized`), with `NAME.weight_scale` (float16, a column a
group) and, where zeros are codes of their own, `NAME.weight_zero_point` (int32, packed along the outputs).

What that form has no place for is kept under our own names, and the folder's `quant_method` is then `bessemer`, which other
readers refuse: GPT-2's and gpt-oss's matrices, which lie there input by output; and schemes that it does not know
(`Scheme.compressed`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bessemer.model.families.layout import Stored, whole
from bessemer.model.quantisation.quantised_modules import EMBEDDING, HEAD
from bessemer.model.quantisation.schemes.base import CompressedForm, Scheme


@dataclass(frozen=True)
class StoredPart:
    """One tensor of a file that holds codes, scales or zeros.

    ours: the tensor of ours that it is made of, of `ours_shape`, seen through `view`. pack and unpack: between that view and
    the file's form; unpack is None for what is there for other readers alone and says nothing new.
    """

    name: str
    ours: str
    ours_shape: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    view: Callable[[Tensor], Tensor]
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor], Tensor] | None

    def packed(self, ours: Mapping[str, Tensor]) -> Tensor:
        """The tensor as the file holds it."""
        return self.pack(self.view(ours[self.ours]))


def compressed_form(module: str, scheme: Scheme) -> CompressedForm | None:
    """The form in which compressed-tensors keeps a module's weight; None where it has none."""
    return scheme.compressed("embedding" if module == EMBEDDING else "head" if module == HEAD else "block")


def fits_compressed_tensors(stored: Sequence[Stored], schemes: Mapping[str, Scheme], weights: Collection[str]) -> bool:
    """Whether compressed-tensors has a form for every weight. weights: names of the tensors that are quantised."""
    if any(compressed_form(module, scheme) is None for module, scheme in schemes.items()):
        return False
    return all(one.is_rows for one in stored if any(place.name in weights for place in one.places))


def compressed_parts(one: Stored, module: str, scheme: Scheme, shape: tuple[int, ...], tied: bool) -> Iterator[StoredPart]:
    """The tensors that take the place of `one`, a weight of ours with this shape or rows of it."""
    form, ours, view = compressed_form(module, scheme), scheme.tensors(*shape), one.places[0].view
    assert form is not None, scheme
    outputs, inputs = view(torch.empty(shape, device="meta")).shape
    base = one.name.removesuffix(".weight")
    for suffix, name, spec, pack, unpack in form.tensors(outputs, inputs):
        made_of = (f"{module}.{name}", ours[name].shape)
        yield StoredPart(f"{base}.{suffix}", *made_of, *spec, view, pack, unpack)
        # a reader that ties the codes gives the head scales of its own
        if name == "scales" and module == EMBEDDING and tied:
            yield StoredPart(f"{HEAD}.{suffix}", *made_of, *spec, view, pack, None)


def own_parts(module: str, scheme: Scheme, shape: tuple[int, ...]) -> Iterator[StoredPart]:
    """The scheme's tensors, under our own names and as they are."""
    for name, spec in scheme.tensors(*shape).items():
        yield StoredPart(f"{module}.{name}", f"{module}.{name}", spec.shape, *spec, whole, whole, whole)
