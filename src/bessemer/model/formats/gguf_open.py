"""A GGUF file opened as a decoder, its quantised matrices as they lie in the file."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor

from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.model.families.layout import Stored
from bessemer.model.folder import read_end_tokens
from bessemer.model.formats.gguf_codes import SCHEMES, keeps_rows, parts_of
from bessemer.model.formats.gguf_families import Plus
from bessemer.model.formats.gguf_import import GgufFile, Wanted, in_a_family, write_tokenizer
from bessemer.model.initialisation import empty_decoder, fill
from bessemer.model.quantisation.layout import quantisable_weights
from bessemer.model.quantisation.shells import put_shells, set_dtype
from bessemer.model.quantised_linear import Scheme
from bessemer.tokenization.folder import TOKENIZER_FILE
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer


class OpenedModel(NamedTuple):
    """A model out of a file: `tokenizer` is None where the file has none, `end_tokens` are those that end an answer, `notes`
    what is to be told, a sentence each."""

    model: Decoder
    tokenizer: Tokenizer | None
    end_tokens: frozenset[int]
    notes: list[str]


def open_gguf(
    path: Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, split: str | None = None
) -> OpenedModel:
    """The decoder of a GGUF file and its tokenizer.

    Matrices in Q4_0, Q4_1 and Q8_0 keep their codes; those of other quantised types are decoded. dtype: of all that is no
    code; when None, the file's where it holds halves, and float32 where it is quantised. split: name of the tokenizer's split
    regex, where the file does not say. Raises ArtefactError as `import_gguf`.
    """
    with path.open("rb") as stream:
        file = GgufFile(path, stream)
        config = file.config()
        wanted = Wanted(file, config)
        kind = dtype or file.dtype()
        with TemporaryDirectory() as beside:
            notes = write_tokenizer(file, config, Path(beside), split)
            found = (Path(beside) / TOKENIZER_FILE).exists()
            tokenizer = load_tokenizer(Path(beside)) if found else None
            end_tokens = read_end_tokens(Path(beside))
        schemes, weights = _tensors(file, wanted, config, kind)
    model = put_shells(empty_decoder(in_a_family(config)), schemes)
    set_dtype(model, kind)
    return OpenedModel(fill(model, weights).to(device), tokenizer, end_tokens, notes)


def _tensors(
    file: GgufFile, wanted: Wanted, config: ModelConfig, dtype: torch.dtype
) -> tuple[dict[str, Scheme], dict[str, Tensor]]:
    """The schemes of the weights that keep their codes, by module, and every tensor of the decoder."""
    modules, shapes = quantisable_weights(config)
    schemes = {
        module: scheme
        for name, module in modules.items()
        if (scheme := _scheme(file, wanted.of(name), shapes[module])) is not None
    }
    # the matrices of an expert are kept alike
    for module in [name for name in schemes if ".experts." in name]:
        if not all(f"{module.rpartition('.')[0]}.{part}" in schemes for part in ("gate_up_proj", "down_proj")):
            del schemes[module]
    weights: dict[str, Tensor] = {}
    for name in wanted.names:
        module = modules.get(name, "")
        if module not in schemes:
            if name not in weights:
                wanted.fill(name, weights, dtype)
            continue
        for stored in wanted.of(name):
            _take(file, stored, {name: module}, schemes, shapes, weights)
    return schemes, weights


def _scheme(file: GgufFile, stored: list[Stored], shape: tuple[int, ...]) -> Scheme | None:
    """The scheme in which the file holds a weight of ours; None where it has to be decoded."""
    kinds = {file.kind(one.name) for one in stored}
    rows = all(keeps_rows(place.view, shape) for one in stored for place in one.places)
    alike = len(kinds) == 1 and rows and not any(isinstance(one, Plus) for one in stored)
    # several of our weights in one tensor of the file are decoded: they would have to be cut out of its codes
    return SCHEMES.get(kinds.pop()) if alike and all(len(one.places) == 1 for one in stored) else None


def _take(
    file: GgufFile,
    stored: Stored,
    modules: dict[str, str],
    schemes: dict[str, Scheme],
    shapes: dict[str, tuple[int, ...]],
    weights: dict[str, Tensor],
) -> None:
    """Put the codes of a tensor of the file where they belong."""
    place = stored.places[0]
    module = modules[place.name]
    scheme, shape = schemes[module], shapes[module]
    full = {"codes": scheme.code_shape(*shape)}
    for part, tensor in parts_of(file.read_codes(stored.name)).items():
        name = f"{module}.{part}"
        if name not in weights:
            weights[name] = torch.empty(full.get(part, scheme.scale_shape(*shape)), dtype=tensor.dtype)
        view = place.view(weights[name])
        view.copy_(tensor.reshape(view.shape))
