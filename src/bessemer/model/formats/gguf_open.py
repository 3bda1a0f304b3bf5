"""A GGUF file opened as a decoder, its quantised matrices as they lie in the file."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor

from bessemer.core.environment import free_memory_bytes
from bessemer.core.errors import ArtefactError
from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.model.families.layout import Stored
from bessemer.model.formats.gguf_base import Plus
from bessemer.model.formats.gguf_blocks import ENCODED, is_quantised_type, keeps_rows, scheme_of
from bessemer.model.formats.gguf_import import GgufFile, Wanted, in_a_family, parts_of, write_tokenizer
from bessemer.model.initialisation import empty_decoder, fill
from bessemer.model.quantisation.base import Scheme
from bessemer.model.quantisation.integers import BLOCK
from bessemer.model.quantisation.quantised_decoder import replace_with_quantised_modules, set_dtype
from bessemer.model.quantisation.quantised_layers import DeferredCodes, quantised_parts
from bessemer.model.quantisation.storage import quantisable_weights
from bessemer.model.storage.model_config import read_end_tokens
from bessemer.tokenization.tokenizer import Tokenizer


class OpenedModel(NamedTuple):
    """A model out of a file: `tokenizer` is None where the file has none, `end_tokens` are those that end an answer, `notes`
    notes on the tokenizer, a sentence each, `encoded` a note on weights that have other codes than the
    file's, if any."""

    model: Decoder
    tokenizer: Tokenizer | None
    end_tokens: frozenset[int]
    notes: list[str]
    encoded: str | None = None


def open_gguf(
    path: Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    split: str | None = None,
    *,
    deferred: bool = False,
) -> OpenedModel:
    """The decoder of a GGUF file and its tokenizer.

    Matrices keep their codes; those in types without a scheme, and those whose parts have several types, are encoded again
    in 8 bits, one tensor after the other. dtype: of all that is no code; when None, the file's where it holds halves, and
    float32 where it is quantised. split: name of the tokenizer's split regex, where the file does not say. deferred: for a
    caller that packs the codes or reads them (`read_deferred_codes`); on the processor those that must be taken out of the
    file's blocks stay there until then. Raises ArtefactError as `import_gguf`, and for a model that free memory does not hold.
    """
    with path.open("rb") as stream:
        file = GgufFile(path, stream)
        config = file.config()
        wanted = Wanted(file, config)
        kind = dtype or file.dtype()
        tensors = _Tensors(file, wanted, config, kind)
        tensors.refuse_what_does_not_fit()
        tokenizer_folder = TemporaryDirectory()
        notes, tokenizer = write_tokenizer(file, config, Path(tokenizer_folder.name), split, compact=True)
        end_tokens = read_end_tokens(Path(tokenizer_folder.name))
        if tokenizer is not None:
            # the tokenizer reads some of its files later
            weakref.finalize(tokenizer, tokenizer_folder.cleanup)
        later = tensors.deferred() if deferred and torch.device(device).type == "cpu" else {}
        weights = tensors.read(later)
    model = replace_with_quantised_modules(empty_decoder(in_a_family(config)), tensors.schemes)
    set_dtype(model, kind)
    parts = quantised_parts(fill(model, weights))
    for name, codes in later.items():
        parts[name].defer(codes)
    # a move reads what is deferred
    model = model if later else model.to(device)
    return OpenedModel(model, tokenizer, end_tokens, notes, tensors.encoded())


class _Tensors:
    """The decoder's tensors, those of quantised types as codes: `schemes` of the weights that are, by module."""

    def __init__(self, file: GgufFile, wanted: Wanted, config: ModelConfig, dtype: torch.dtype) -> None:
        self._file = file
        self._wanted = wanted
        self._dtype = dtype
        self._modules, self._shapes = quantisable_weights(config)
        self.schemes = {
            module: scheme for name, module in self._modules.items() if (scheme := self._scheme(name, module)) is not None
        }
        # both matrices of an expert are quantised, or none
        for module in [name for name in self.schemes if ".experts." in name]:
            if not all(f"{module.rpartition('.')[0]}.{part}" in self.schemes for part in ("gate_up_proj", "down_proj")):
                del self.schemes[module]

    def _scheme(self, name: str, module: str) -> Scheme | None:
        """The scheme of a weight of ours: the file's, 8 bits where it has another or several; None where it is of floats, or
        lies otherwise in the file than by its rows."""
        stored = self._wanted.of(name)
        kinds = {self._file.kind(one.name) for one in stored}
        if not all(map(is_quantised_type, kinds)) or not all(map(self._in_rows, stored)) or self._shapes[module][-1] % BLOCK:
            return None
        return (scheme_of(kinds.pop()) if len(kinds) == 1 else None) or ENCODED

    def _in_rows(self, stored: Stored) -> bool:
        """Whether a tensor of the file is rows of weights of ours, so that its codes can be put in their place row by row."""
        if isinstance(stored, Plus) or (len(stored.views) > 1 and (stored.dim or stored.shape)):
            return False
        return all(keeps_rows(place.view, self._wanted.shapes[place.name]) for place in stored.views)

    def refuse_what_does_not_fit(self) -> None:
        """Raises ArtefactError for a model that is larger than free memory: what is kept, and the copy of the largest tensor
        that is made while it is read or packed."""
        sizes = [self._bytes(name, shape) for name, shape in self._wanted.shapes.items()]
        need, free = sum(sizes) + max(sizes, default=0), free_memory_bytes()
        if free is not None and need > free:
            raise ArtefactError(
                f"{self._file.path}: opened it takes {need / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free; "
                "take a smaller model, or one of fewer bits"
            )

    def _bytes(self, name: str, shape: tuple[int, ...]) -> int:
        scheme = self.schemes.get(self._modules.get(name, ""))
        if scheme is None:
            return prod(shape) * self._dtype.itemsize
        return scheme.nbytes(*shape)

    def encoded(self) -> str | None:
        """A note on weights that are encoded again."""
        kinds: dict[str, int] = {}
        for name, module in self._modules.items():
            for one in self._wanted.of(name) if module in self.schemes else []:
                kind = self._file.kind(one.name)
                if scheme_of(kind) != self.schemes[module]:
                    kinds[kind] = kinds.get(kind, 0) + 1
        if not kinds:
            return None
        held = sum(self._bytes(name, shape) for name, shape in self._wanted.shapes.items())
        types = ", ".join(f"{count} in {kind}" for kind, count in sorted(kinds.items()))
        count = sum(kinds.values())
        what = "1 matrix is" if count == 1 else f"{count} matrices are"
        return (
            f"{what} held in codes of 8 bits ({types}): {held / 1e9:.2f} GB in memory, "
            f"{sum(part.stat().st_size for part in parts_of(self._file.path)) / 1e9:.2f} GB in the file"
        )

    def deferred(self) -> dict[str, DeferredCodes]:
        """What takes a module's codes out of the file later, of the modules that are one matrix of it each."""
        found: dict[str, DeferredCodes] = {}
        for name, module in self._modules.items():
            stored = self._wanted.of(name)
            if module in self.schemes and len(stored) == 1 and [place.name for place in stored[0].views] == [name]:
                codes = self._file.deferred_codes(stored[0], self.schemes[module])
                if codes is not None:
                    found[module] = codes
        return found

    def read(self, deferred: Collection[str] = ()) -> dict[str, Tensor]:
        """Every tensor, by its name in the decoder: those of the modules in `deferred` have no memory."""
        weights: dict[str, Tensor] = {}
        taken: set[str] = set()
        for name in self._wanted.names:
            module = self._modules.get(name, "")
            if module in deferred:
                for part, spec in self.schemes[module].tensors(*self._shapes[module]).items():
                    weights[f"{module}.{part}"] = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
                continue
            if module not in self.schemes:
                if name not in weights:
                    self._wanted.fill(name, weights, self._dtype)
                continue
            for stored in self._wanted.of(name):
                if stored.name not in taken:
                    self._take_codes(stored, weights)
                    taken.add(stored.name)
        return weights

    def _take_codes(self, stored: Stored, weights: dict[str, Tensor]) -> None:
        """Put the codes of a tensor of the file where they belong."""
        modules = {place.name: self._modules[place.name] for place in stored.views}
        scheme = self.schemes[next(iter(modules.values()))]
        for part, tensor in self._file.read_codes(stored.name, scheme).tensors.items():
            if stored.is_whole:
                weights[f"{modules[stored.views[0].name]}.{part}"] = tensor
                continue
            for module in modules.values():
                if f"{module}.{part}" not in weights:
                    shape = scheme.tensors(*self._shapes[module])[part].shape
                    weights[f"{module}.{part}"] = torch.empty(shape, dtype=tensor.dtype)
            Stored(stored.name, stored.views).unpack(
                tensor, {name: weights[f"{module}.{part}"] for name, module in modules.items()}
            )
