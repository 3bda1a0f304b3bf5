"""A model in a GGUF file, as a Hugging Face folder."""

from __future__ import annotations

import mmap
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from torch import Tensor

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.store import new_folder, write_json
from bessemer.model.config import ModelConfig
from bessemer.model.cpu_kernels.weight_memory import passing_memory
from bessemer.model.families import family_of
from bessemer.model.families.layout import Stored
from bessemer.model.formats.gguf_base import SETTINGS, GgufFamily, GgufHead, Plus
from bessemer.model.formats.gguf_blocks import (
    BLOCK_TYPES,
    OTHER_TYPES,
    dequantise,
    encode_blocks,
    read_codes,
    scheme_of,
    split_blocks,
    splits_blocks,
)
from bessemer.model.formats.gguf_families import GGUF_FAMILIES
from bessemer.model.initialisation import tensor_shapes
from bessemer.model.quantisation.base import BlockWeight, Codes, Scheme
from bessemer.model.quantisation.blocks import GgufBlocks
from bessemer.model.storage.model_config import GENERATION_CONFIG, write_model_config
from bessemer.model.storage.weights import Entry, write_weights
from bessemer.tokenization.formats.gguf_import import import_gguf as import_gguf_tokenizer
from bessemer.tokenization.formats.gguf_metadata import TensorInfo, read_head
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer

#: Values decoded at a time, to bound memory.
_RUN = 1 << 22
#: Number types that a folder may keep; all others are decoded to float32.
_KEPT = {"F16": torch.float16, "BF16": torch.bfloat16}
#: Number types whose bytes are numbers as PyTorch has them.
_PLAIN = {"F32": torch.float32, **_KEPT}
_NO_TOKENIZER = ("none", "no_vocab")


def import_gguf(path: Path, out: Path, *, dtype: torch.dtype | None = None, split: str | None = None) -> list[str]:
    """Read model and tokenizer of a GGUF file into the folder `out`, tensor by tensor.

    dtype: of the weights in the folder; when None, the file's where it holds halves, and float32, which loses nothing, where
    it is quantised. split: name of the tokenizer's split regex, where the file does not say. The folder is there whole or not
    at all. Returns notes for the user, a sentence each. Raises ArtefactError naming what is wrong: an architecture or a number
    type that is not supported, a tensor that is missing, unexpected, of another shape, or cut off.
    """
    with path.open("rb") as stream, new_folder(out) as folder:
        file = GgufFile(path, stream)
        config = file.config()
        family, wanted = file.family, Wanted(file, config)
        dtype = dtype or file.dtype()
        notes, _ = write_tokenizer(file, config, folder, split)
        config = in_a_family(config)
        places = list(tensor_shapes(config).items())
        stored = list(family_of(config).stored(config, [name for name, _ in places]))
        entries = [Entry(one.name, one.shape_in(dict(places)), dtype) for one in stored]
        write_weights(folder, entries, wanted.packed(stored, dtype))
        write_model_config(config, dtype, folder, tokenizer=None)
        if family.architecture == "gpt-oss" and config.rope_scaling.rope_type == "yarn":
            notes += family.reduced(config)[1]
        if wanted.left_out:
            notes.append(f"{wanted.left_out} tensors of multi-token prediction are left out")
        if wanted.rounded:
            notes.append(
                f"{wanted.rounded} tensors that the file holds more exactly are rounded to {str(dtype).removeprefix('torch.')}"
            )
    return notes


def read_gguf_config(path: Path) -> ModelConfig:
    """The model's config that a GGUF file holds. Raises ArtefactError as `import_gguf`."""
    with path.open("rb") as stream:
        return in_a_family(GgufFile(path, stream).config())


def in_a_family(config: ModelConfig) -> ModelConfig:
    """The config as a family that can hold it: the one that the architecture is named after, or the first that fits."""
    try:
        family_of(config)
    except ConfigError:
        return config.with_changes(model_type=None)
    return config


def write_tokenizer(
    file: GgufFile, config: ModelConfig, folder: Path, split: str | None, *, compact: bool = False
) -> tuple[list[str], Tokenizer | None]:
    """Write the file's tokenizer and its settings of generation into a folder; returns notes, and the tokenizer if any.

    compact: nobody reads the folder but this process.
    """
    tokenizer: Tokenizer | None = None
    kind = file.head.values.get("tokenizer.ggml.model")
    ends = [id for id in (config.eos_token_id, file.head.token("eot")) if id is not None]
    if kind is None or kind in _NO_TOKENIZER:
        notes = ["the file holds no tokenizer"]
    else:
        foreign = import_gguf_tokenizer(file.path, split)
        foreign.write(folder, compact=compact)
        notes = list(foreign.notes)
        tokenizer = load_tokenizer(folder)
        if tokenizer.vocab_size > config.vocab_size:
            raise ArtefactError(
                f"{file.path}: {tokenizer.vocab_size:,} tokens, and the embedding has {config.vocab_size:,} rows"
            )
        ends += [id for id in tokenizer.eos_ids if id != tokenizer.bos_id]
    begins = {"bos_token_id": config.bos_token_id} if config.bos_token_id is not None else {}
    write_json(folder / GENERATION_CONFIG, begins | ({"eos_token_id": list(dict.fromkeys(ends))} if ends else {}))
    return notes, tokenizer


#: The end of the name of one of several files, as llama-gguf-split gives it.
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf")


def parts_of(path: Path) -> list[Path]:
    """The files of a model whose first is `path`, by its name: more than one where that ends as llama-gguf-split has it."""
    named = _PART.search(path.name)
    if named is None or int(named[1]) != 1:
        return [path]
    beginning, count = path.name[: named.start()], int(named[2])
    return [path.with_name(f"{beginning}-{part:05d}-of-{count:05d}.gguf") for part in range(1, count + 1)]


def _other_parts(path: Path, values: Mapping[str, Any]) -> list[Path]:
    """The other files of a model, in order; none for one in one file. Raises ArtefactError where `path` is not the first, or
    one is missing."""
    count = values.get("split.count", 1)
    if count in (0, 1):
        return []
    parts = parts_of(path)
    if len(parts) != count or values.get("split.no", 0) != 0:
        raise ArtefactError(
            f"{path}: this is one of {count} files of a model; name the first, …-00001-of-….gguf, with the others beside it"
        )
    for part in parts[1:]:
        if not part.is_file():
            raise ArtefactError(f"{part}: missing; {path.name} is the first of {count} files of a model")
    return parts[1:]


class GgufFile:
    """An open GGUF file, or the first of several that a model was split into: its head, checked, and all tensors.

    stream: of the first file; the others are opened here, and closed with this object.
    """

    #: By the architectures that are read.
    families: ClassVar[Mapping[str, GgufFamily | None]] = GGUF_FAMILIES

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path = path
        values, infos = read_head(path)
        self.infos: dict[str, TensorInfo] = {}
        self._streams: dict[str, BinaryIO] = {}
        self._add(path, stream, infos)
        others = _other_parts(path, values)
        for other in others:
            part_values, infos = read_head(other)
            if part_values.get("split.count") != len(others) + 1 or part_values.get("split.no") != others.index(other) + 1:
                raise ArtefactError(f"{other}: this is no part of the model in {path.name}; fetch the parts of one model")
            part = other.open("rb")
            weakref.finalize(self, part.close)
            self._add(other, part, infos)
        architecture = values.get("general.architecture")
        if architecture == "clip" and architecture not in self.families:
            raise ArtefactError(f"{path}: this is the encoder of pictures of a model (mmproj); name the model, with it beside")
        if not isinstance(architecture, str) or architecture not in self.families:
            known = ", ".join(self.families)
            raise ArtefactError(f"{path}: the architecture {architecture!r} is not supported; supported: {known}")
        self._family = self.families[architecture]
        settings = {name: self.read(name) for name in SETTINGS if name in self.infos}
        shapes = {name: info.shape for name, info in self.infos.items()}
        self.head = GgufHead(path, architecture, values, shapes, settings)

    @property
    def family(self) -> GgufFamily:
        """llama.cpp's architecture of the decoder."""
        assert self._family is not None, "the file holds a decoder"
        return self._family

    def _add(self, path: Path, stream: BinaryIO, infos: Iterable[TensorInfo]) -> None:
        size = path.stat().st_size
        for info in infos:
            if info.name in self.infos:
                raise ArtefactError(f"{path}: tensor {info.name!r} is there twice")
            self.infos[info.name] = info
            self._streams[info.name] = stream
            self._check(info, path, size)

    def _check(self, info: TensorInfo, path: Path, size: int) -> None:
        if info.type not in BLOCK_TYPES:
            kind = OTHER_TYPES.get(info.type, f"number {info.type}")
            known = ", ".join(block.name for block in BLOCK_TYPES.values())
            raise ArtefactError(f"{path}: tensor {info.name!r} has the type {kind}; supported: {known}")
        block = BLOCK_TYPES[info.type]
        if 0 in info.shape:
            raise ArtefactError(f"{path}: tensor {info.name!r} of the shape {info.shape} is empty")
        if not info.shape or info.shape[-1] % block.values:
            raise ArtefactError(
                f"{path}: tensor {info.name!r} of the shape {info.shape} has rows that are no whole blocks of {block.name}"
            )
        end = info.start + self._bytes(info)
        if end > size:
            raise ArtefactError(f"{path}: tensor {info.name!r} ends at byte {end:,} and the file has {size:,}: it is cut off")

    @staticmethod
    def _bytes(info: TensorInfo) -> int:
        block = BLOCK_TYPES[info.type]
        return prod(info.shape) // block.values * block.bytes

    def config(self) -> ModelConfig:
        """The decoder that the keys describe."""
        layers = self.head.whole("block_count")
        # checked before the decoder is made
        if layers > len(self.infos):
            raise ArtefactError(f"{self.path}: {layers:,} layers, and {len(self.infos):,} tensors")
        try:
            return ModelConfig.parse(self.family.read(self.head))
        except ConfigError as error:
            raise ArtefactError(f"{self.path}: {error}") from None

    def dtype(self) -> torch.dtype:
        """The type of most numbers, where a folder can have it; float32 where it is quantised."""
        sizes: dict[torch.dtype, int] = {}
        for info in self.infos.values():
            kind = _KEPT.get(BLOCK_TYPES[info.type].name, torch.float32)
            sizes[kind] = sizes.get(kind, 0) + prod(info.shape)
        return max(sizes, key=lambda kind: sizes[kind])

    def _runs(self, info: TensorInfo) -> Iterator[bytes]:
        """The blocks of a tensor, in batches that bound the memory of what is made of them."""
        block = BLOCK_TYPES[info.type]
        step, end = max(_RUN // block.values, 1) * block.bytes, info.start + self._bytes(info)
        stream = self._streams[info.name]
        stream.seek(info.start)
        for start in range(info.start, end, step):
            yield stream.read(min(step, end - start))

    def _mapped(self, info: TensorInfo, dtype: torch.dtype) -> Tensor:
        """The bytes of a tensor as the file has them, flat: pages of the file, copied where they are written to, and given back
        with the tensor. Overwriting the file meanwhile changes the tensor, so files are replaced as a whole."""
        size, stream = self._bytes(info), self._streams[info.name]
        lead = info.start % mmap.ALLOCATIONGRANULARITY
        memory = mmap.mmap(stream.fileno(), lead + size, access=mmap.ACCESS_COPY, offset=info.start - lead)
        return torch.frombuffer(memory, dtype=dtype, count=size // dtype.itemsize, offset=lead)

    def kind(self, name: str) -> str:
        """The number type of a tensor."""
        return BLOCK_TYPES[self.infos[name].type].name

    def read_codes(self, name: str, scheme: Scheme) -> Codes:
        """A tensor of a quantised type as codes of a scheme, run by run: those of the file where they are of it, else made of
        its values, of 8 bits."""
        info, kind = self.infos[name], self.kind(name)
        block, as_it_is = BLOCK_TYPES[info.type], scheme_of(kind) == scheme
        shapes = scheme.tensors(*info.shape)
        if as_it_is and isinstance(scheme, GgufBlocks):
            return Codes(scheme, {part: self._mapped(info, spec.dtype).view(spec.shape) for part, spec in shapes.items()})
        made = {part: passing_memory(spec.shape, spec.dtype) for part, spec in shapes.items()}
        if as_it_is and split_blocks(self._mapped(info, torch.uint8), kind, made):
            return Codes(scheme, made)
        whole = {part: tensor.view(-1) for part, tensor in made.items()}
        filled, values = 0, prod(info.shape)
        for raw in self._runs(info):
            first, filled = filled, filled + len(raw) // block.bytes * block.values
            run = {
                part: tensor[first * len(tensor) // values : filled * len(tensor) // values] for part, tensor in whole.items()
            }
            if as_it_is:
                for part, tensor in read_codes(raw, kind).items():
                    run[part].copy_(tensor)
            else:
                encode_blocks(np.frombuffer(raw, np.uint8), kind, run["codes"].numpy(), run["scales"].numpy())
        return Codes(scheme, made)

    def deferred_codes(self, stored: Stored, scheme: Scheme) -> FileCodes | None:
        """What takes a matrix of ours out of the file's mapped blocks later, in our order of rows; None where it is read now:
        its codes are the blocks as they lie there, are of another scheme, or the kernels do not take them apart."""
        info, kind = self.infos[stored.name], self.kind(stored.name)
        lies_there = isinstance(scheme, GgufBlocks)
        if scheme_of(kind) != scheme or len(info.shape) != 2 or (stored.is_whole if lies_there else not splits_blocks(kind)):
            return None
        return FileCodes(stored, kind, info.shape[1], scheme, self._mapped(info, torch.uint8).view(info.shape[0], -1))

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor's values, decoded run by run; as they are where the file has them in the type."""
        info = self.infos[name]
        block = BLOCK_TYPES[info.type]
        plain = _PLAIN.get(block.name)
        if plain == dtype and info.start % dtype.itemsize == 0:
            return self._mapped(info, dtype).view(info.shape)
        values = torch.empty(info.shape, dtype=dtype)
        flat, filled = values.view(-1), 0
        for raw in self._runs(info):
            run = torch.from_numpy(dequantise(raw, block)) if plain is None else torch.frombuffer(bytearray(raw), dtype=plain)
            flat[filled : filled + len(run)] = run
            filled += len(run)
        return values


class FileCodes:
    """A matrix of ours, all of one of a file, whose blocks are put in order and taken apart when they are asked for
    (`DeferredCodes`)."""

    def __init__(self, stored: Stored, kind: str, inputs: int, scheme: Scheme, blocks_NB: Tensor) -> None:
        """kind: the number type; blocks_NB: the mapped tensor, uint8."""
        self._stored, self._kind, self._inputs, self._scheme, self._blocks_NB = stored, kind, inputs, scheme, blocks_NB

    def _ours(self) -> Tensor:
        """The blocks, their rows in our order."""
        if self._stored.is_whole:
            return self._blocks_NB
        blocks_NB = passing_memory(tuple(self._blocks_NB.shape), torch.uint8)
        Stored(self._stored.name, self._stored.views).unpack(self._blocks_NB, {self._stored.views[0].name: blocks_NB})
        return blocks_NB

    def block_weight(self) -> BlockWeight:
        """The blocks, for the kernels to pack."""
        return BlockWeight(self._ours(), self._kind, self._inputs)

    def __call__(self, rows: Tensor | None) -> Codes:
        blocks = self._ours() if rows is None else self._ours()[rows]
        if isinstance(self._scheme, GgufBlocks):
            return Codes(self._scheme, {"codes": blocks})
        *lead, _ = blocks.shape
        shapes = self._scheme.tensors(prod(lead), self._inputs)
        made = {part: passing_memory(spec.shape, spec.dtype) for part, spec in shapes.items()}
        done = split_blocks(blocks.flatten(), self._kind, made)
        assert done, self._kind
        return Codes(self._scheme, {part: tensor.view(*lead, *tensor.shape[1:]) for part, tensor in made.items()})


class Wanted:
    """The tensors that a config asks for, checked against the file before any is read. shapes: of every tensor of ours."""

    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        self._file = file
        self.shapes = tensor_shapes(config)
        self._by_place: dict[str, list[Stored]] = {name: [] for name in self.shapes}
        self.left_out = 0
        self.rounded = 0
        names = set(SETTINGS)
        for stored in file.family.stored(config, list(self.shapes)):
            shape, asked = file.head.shape(stored.name), stored.shape_in(self.shapes)
            if shape != asked:
                raise ArtefactError(f"{file.path}: tensor {stored.name!r} has the shape {shape}, its keys ask for {asked}")
            names.add(stored.name)
            for place in stored.views:
                self._by_place[place.name].append(stored)
        for name in file.infos.keys() - names:
            block = re.match(r"blk\.(\d+)\.", name)
            if block and int(block[1]) >= config.num_hidden_layers and file.head.whole("nextn_predict_layers", 0):
                self.left_out += 1
            else:
                raise ArtefactError(f"{file.path}: unexpected tensor {name!r}; the file's keys describe no such part")

    def packed(self, targets: Sequence[Stored], dtype: torch.dtype) -> Iterator[Tensor]:
        """The tensors of another layout one by one; each of ours is freed after its last use."""
        last = {place.name: index for index, target in enumerate(targets) for place in target.views}
        ours: dict[str, Tensor] = {}
        for index, target in enumerate(targets):
            for place in target.views:
                if place.name not in ours:
                    self.fill(place.name, ours, dtype)
            yield target.pack(ours)
            for name in {place.name for place in target.views}:
                if last[name] == index:
                    del ours[name]

    @property
    def names(self) -> list[str]:
        """Every tensor of ours."""
        return list(self.shapes)

    def of(self, name: str) -> list[Stored]:
        """The tensors of the file that hold one of ours."""
        return self._by_place[name]

    def fill(self, name: str, ours: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Read one of our tensors, and the others that share tensors of the file with it."""
        for stored in self._by_place[name]:
            values = self._read(stored, dtype)
            if stored.is_whole:
                ours[name] = values
                continue
            for place in stored.views:
                if place.name not in ours:
                    ours[place.name] = torch.empty(self.shapes[place.name], dtype=dtype)
            stored.unpack(values, ours)

    def _read(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        """A tensor of the file; in float32 where unpacking computes with it."""
        kind = self._file.kind(stored.name)
        if _KEPT.get(kind) == dtype and not isinstance(stored, Plus):
            return self._file.read(stored.name, dtype)
        values = self._file.read(stored.name)
        if dtype != torch.float32 and not torch.equal(values.to(dtype).float(), values):
            self.rounded += 1
        return values.to(dtype) if stored.is_whole else values
