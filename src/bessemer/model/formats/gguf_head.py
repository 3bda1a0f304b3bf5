"""The header of a GGUF file: the keys of its architecture, and the tensors it holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from torch import Tensor

from bessemer.core.errors import ArtefactError


@dataclass(frozen=True)
class GgufHead:
    """The metadata under one architecture's name, and the shapes of the tensors.

    values: all keys. rope_factors: the content of the one tensor that is a setting and no parameter.
    """

    place: Path
    architecture: str
    values: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    rope_factors: Tensor | None = None

    def get(self, name: str, default: Any = None) -> Any:
        """The value under `ARCHITECTURE.NAME`. A list of equal values, one a layer, is that value.

        Raises ArtefactError where the layers differ: the decoder's are all alike.
        """
        key = f"{self.architecture}.{name}"
        value = self.values.get(key, default)
        if isinstance(value, list):
            if not value or any(one != value[0] for one in value):
                raise ArtefactError(f"{self.place}: {key!r} differs from layer to layer, which is not supported")
            value = value[0]
        return shortest(value) if isinstance(value, float) else value

    def __getitem__(self, name: str) -> Any:
        """As `get`, for a key that must be there. Raises ArtefactError."""
        value = self.get(name)
        if value is None:
            raise ArtefactError(f"{self.place}: the key '{self.architecture}.{name}' is missing")
        return value

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number, which must be there unless a default is given. Raises ArtefactError."""
        value = self.get(name, default)
        if value is None or isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
            raise ArtefactError(
                f"{self.place}: the key '{self.architecture}.{name}' "
                + ("is missing" if value is None else f"should be a whole number, got {value!r}")
            )
        return value

    @overload
    def number(self, name: str, default: float) -> float: ...

    @overload
    def number(self, name: str, default: None = None) -> float | None: ...

    def number(self, name: str, default: float | None = None) -> float | None:
        """A finite number, or the default where there is none. Raises ArtefactError."""
        value = self.get(name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or abs(value) >= 1 << 63:
            raise ArtefactError(f"{self.place}: the key '{self.architecture}.{name}' should be a number, got {value!r}")
        return value

    def token(self, role: str) -> int | None:
        """The id of the tokenizer's begin or end token."""
        value = self.values.get(f"tokenizer.ggml.{role}_token_id")
        return value if isinstance(value, int) else None

    def shape(self, tensor: str) -> tuple[int, ...]:
        """The shape of a tensor. Raises ArtefactError when there is none of that name."""
        if tensor not in self.shapes:
            raise ArtefactError(f"{self.place}: tensor {tensor!r} is missing")
        return self.shapes[tensor]

    def has(self, tensor: str) -> bool:
        """Whether the file holds a tensor."""
        return tensor in self.shapes


def shortest(value: float) -> float:
    """The shortest decimal number that is the same in float32, in which GGUF holds it: 1e-05 and not 9.99999974e-06."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))
