"""What the tensors of a file with quantised weights are made of, and the forms of published folders that are only read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bessemer.model.families.layout import Stored
from bessemer.model.quantisation.base import Scheme


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
    #: Whether a file may hold another number of elements, as of JSON.
    any_length: bool = False

    def packed(self, ours: Mapping[str, Tensor]) -> Tensor:
        """The tensor as the file holds it."""
        return self.pack(self.view(ours[self.ours]))


@dataclass(frozen=True)
class ReadForm:
    """A form of folders that is read and not written; settings: the folder's `quantization_config`.

    check: raises ArtefactError for variants that are not read. scheme: of every quantised matrix. is_left: whether a linear
    layer's matrix, by its name in the file without `.weight`, is left as it is. parts: the tensors that take the place of a
    stored matrix, of a module, its scheme, and its shape; raises ArtefactError where it is packed with others.
    """

    check: Callable[[Mapping[str, Any], Path], None]
    scheme: Callable[[Mapping[str, Any]], Scheme]
    is_left: Callable[[Mapping[str, Any], str], bool]
    parts: Callable[[Stored, str, Scheme, tuple[int, ...], Mapping[str, Any]], Iterator[StoredPart]]
