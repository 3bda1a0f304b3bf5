"""Quantised weights in the files of a Hugging Face folder: tensors, and `quantization_config`.

The form is that of the package `compressed-tensors`. A matrix `NAME.weight` is stored as `NAME.weight_packed` (int32, several
codes each, `pack-quantized`) or as `NAME.weight` (int8, `int-quantized` where activations are quantised too, else
`naive-quantized`), with `NAME.weight_scale` (float16, a column a group) and, where zeros are codes of their own,
`NAME.weight_zero_point` (int32, packed along the outputs).

Folders of AutoAWQ and of GPTQ are read (`word_forms.py`), those of 8 bits in floating point (`fp8.py`), gpt-oss's of 4 bits
(`fp4.py`), and those of 8 bits that `bitsandbytes` makes (`llm_int8.py`).

Weights of the scheme nf4 alone are in the form of `bitsandbytes` (`load_in_4bit`): `NAME.weight` (uint8, two codes a byte),
`NAME.weight.absmax`, with `nested_absmax` where scales are codes, and `quant_state.bitsandbytes__nf4`, JSON as bytes.

What these forms have no place for is kept under our own names, and the folder's `quant_method` is then `bessemer`, which other
readers refuse: GPT-2's and gpt-oss's matrices, which are stored input by output, and schemes that it does not know
(`Scheme.compressed`).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.model.families import OWN, family_of
from bessemer.model.families.base import Family
from bessemer.model.families.layout import FilePatterns, Stored, whole
from bessemer.model.initialisation import empty_decoder
from bessemer.model.quantisation.base import CompressedForm, Scheme, first_scheme
from bessemer.model.quantisation.config import SCHEMES
from bessemer.model.quantisation.fp4 import MXFP4, MXFP4_FORM
from bessemer.model.quantisation.fp8 import FP8, FP8_FORM
from bessemer.model.quantisation.llm_int8 import LLM_INT8, is_skipped
from bessemer.model.quantisation.nf4 import BLOCK, LEVELS, NF4, SCALE_BLOCK, dynamic_map
from bessemer.model.quantisation.quantised_decoder import EMBEDDING, HEAD, quantisable, weight_name
from bessemer.model.quantisation.quantised_layers import quantised_parts
from bessemer.model.quantisation.storage_parts import ReadForm, StoredPart
from bessemer.model.quantisation.word_forms import AWQ, GPTQ, WORDS


def compressed_form(module: str, scheme: Scheme) -> CompressedForm | None:
    """The form in which compressed-tensors keeps a module's weight; None where it has none."""
    return scheme.compressed("embedding" if module == EMBEDDING else "head" if module == HEAD else "block")


def fits_compressed_tensors(stored: Sequence[Stored], schemes: Mapping[str, Scheme], weights: Collection[str]) -> bool:
    """Whether compressed-tensors has a form for every weight. weights: names of the tensors that are quantised."""
    if any(compressed_form(module, scheme) is None for module, scheme in schemes.items()):
        return False
    return all(one.is_rows for one in stored if any(place.name in weights for place in one.views))


def compressed_parts(one: Stored, module: str, scheme: Scheme, shape: tuple[int, ...], tied: bool) -> Iterator[StoredPart]:
    """The tensors that take the place of `one`, a weight of ours with this shape or rows of it."""
    form, ours, view = compressed_form(module, scheme), scheme.tensors(*shape), one.views[0].view
    assert form is not None, scheme
    outputs, inputs = view(torch.empty(shape, device="meta")).shape
    base = one.name.removesuffix(".weight")
    for suffix, name, spec, pack, unpack, within in form.tensors(outputs, inputs):
        made_of = (f"{module}.{name}", ours[name].shape)
        of_part: Callable[[Tensor], Tensor] = view if within is None else partial(_seen_within, view=view, within=within)
        yield StoredPart(f"{base}.{suffix}", *made_of, *spec, of_part, pack, unpack)
        # readers that tie the codes still expect scales of the head
        if name == "scales" and module == EMBEDDING and tied:
            yield StoredPart(f"{HEAD}.{suffix}", *made_of, *spec, of_part, pack, None)


def _seen_within(tensor: Tensor, view: Callable[[Tensor], Tensor], within: Callable[[Tensor], Tensor]) -> Tensor:
    return within(view(tensor))


def own_parts(module: str, scheme: Scheme, shape: tuple[int, ...]) -> Iterator[StoredPart]:
    """The scheme's tensors, under our own names and as they are."""
    for name, spec in scheme.tensors(*shape).items():
        yield StoredPart(f"{module}.{name}", f"{module}.{name}", spec.shape, *spec, whole, whole, whole)


#: Key of `config.json`.
QUANTIZATION = "quantization_config"
#: Values of `quant_method`.
COMPRESSED_TENSORS, BITSANDBYTES, OWN_FORM = "compressed-tensors", "bitsandbytes", "bessemer"

#: Of forms that are only read, by `quant_method`.
READ_FORMS: dict[str, ReadForm] = {AWQ: WORDS, GPTQ: WORDS, FP8: FP8_FORM, MXFP4: MXFP4_FORM}
#: Bytes of the JSON that bitsandbytes keeps with each matrix, filled up with spaces.
_STATE_BYTES = 256


def fits_bitsandbytes(stored: Sequence[Stored], schemes: Mapping[str, Scheme], modules: Mapping[str, str]) -> bool:
    """Whether bitsandbytes has a form for every quantised weight: nf4 alone, all of one kind, each matrix a tensor of its own.

    modules: the module of each quantised weight by its tensor's name."""
    if len(set(schemes.values())) != 1 or not isinstance(next(iter(schemes.values())), NF4):
        return False
    whole_alone = {one.views[0].name for one in stored if len(one.views) == 1 and one.views[0].view is whole}
    return all(name in whole_alone and name.endswith(".weight") and ".experts." not in name for name in modules)


def bitsandbytes_settings(
    stored: Sequence[Stored], schemes: Mapping[str, Scheme], modules: Mapping[str, str], linear: Sequence[str]
) -> dict[str, Any]:
    """For a folder in the form of bitsandbytes; what is not quantised of linear layers is listed."""
    skipped = [
        one.name.removesuffix(".weight") for one in stored if one.views[0].name in linear and one.views[0].name not in modules
    ]
    scheme = next(iter(schemes.values()))
    assert isinstance(scheme, NF4), scheme
    return {
        "quant_method": BITSANDBYTES,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": scheme.name,
        "bnb_4bit_use_double_quant": scheme.double,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(dict.fromkeys([*skipped, HEAD])),
    }


def bitsandbytes_parts(one: Stored, module: str, scheme: NF4, shape: tuple[int, ...]) -> Iterator[StoredPart]:
    """The tensors that take the place of `one`, a matrix (N, K)."""
    ours = scheme.tensors(*shape)

    def part(
        suffix: str,
        source: str,
        length: tuple[int, ...],
        dtype: torch.dtype,
        pack: Callable[[Tensor], Tensor],
        unpack: Callable[[Tensor], Tensor] | None,
        any_length: bool = False,
    ) -> StoredPart:
        made_of = (f"{module}.{source}", ours[source].shape)
        return StoredPart(f"{one.name}{suffix}", *made_of, length, dtype, whole, pack, unpack, any_length)

    def reshaped(name: str) -> Callable[[Tensor], Tensor]:
        return lambda tensor: tensor.reshape(ours[name].shape)

    def state(tensor: Tensor) -> Tensor:
        values: dict[str, Any] = {"quant_type": scheme.name, "blocksize": BLOCK, "dtype": "float32", "shape": list(shape)}
        if scheme.double:
            nested = {"nested_blocksize": SCALE_BLOCK, "nested_dtype": "float32", "nested_offset": float(tensor)}
            values |= nested
        text = json.dumps(values).encode()
        return torch.frombuffer(bytearray(text.ljust(_STATE_BYTES)), dtype=torch.uint8)

    codes, scales = ours["codes"], ours["scales"]
    yield part("", "codes", (prod(codes.shape), 1), torch.uint8, lambda each: each.reshape(-1, 1), reshaped("codes"))
    yield part(".absmax", "scales", (prod(scales.shape),), scales.dtype, lambda each: each.reshape(-1), reshaped("scales"))
    yield part(".quant_map", "codes", (len(LEVELS),), torch.float32, lambda _: torch.tensor(LEVELS), None)
    name = ".quant_state.bitsandbytes__nf4"
    if not scheme.double:
        yield part(name, "codes", (_STATE_BYTES,), torch.uint8, state, None, True)
        return
    nested = ours["scales_of_scales"].shape
    yield part(".nested_absmax", "scales_of_scales", nested, torch.float32, lambda each: each, lambda each: each)
    yield part(".nested_quant_map", "codes", (256,), torch.float32, lambda _: dynamic_map().clone(), None)
    yield part(name, "mean_scale", (_STATE_BYTES,), torch.uint8, state, _mean_scale, True)


def _mean_scale(state: Tensor) -> Tensor:
    """The mean of a matrix's scales, from the JSON that its file has. Raises ArtefactError where that is damaged, or of blocks
    of another size."""
    try:
        values = json.loads(bytes(state.tolist()).decode())
        sizes, mean = (values["blocksize"], values["nested_blocksize"]), float(values["nested_offset"])
    except (ValueError, KeyError, TypeError):
        raise ArtefactError("a matrix of bitsandbytes has a damaged quant_state; fetch or make the model again") from None
    if sizes != (BLOCK, SCALE_BLOCK):
        raise ArtefactError(
            f"a matrix of bitsandbytes has blocks of {sizes[0]} weights and {sizes[1]} scales; 64 and 256 are read"
        )
    return torch.tensor([mean])


def own_settings(schemes: Mapping[str, Scheme], model_type: str) -> dict[str, Any]:
    """For a folder in our own form: the scheme of every quantised weight by the name of its module.

    `transformers` opens a model whose `quant_method` it does not know, with random weights. So such a folder is not of the
    family `model_type`, which is kept here, but of our own, which `transformers` refuses.
    """
    modules = {name: scheme.described() for name, scheme in schemes.items()}
    return {"quant_method": OWN_FORM, "model_type": model_type, "modules": modules}


def compressed_settings(
    stored: Sequence[Stored], schemes: Mapping[str, Scheme], modules: Mapping[str, str], linear: Sequence[str], tied: bool
) -> dict[str, Any]:
    """The `quantization_config` of a folder in the form of compressed-tensors.

    modules: the module of each quantised weight by its tensor's name. linear: our names of all weights of linear layers.
    tied: whether the embedding is also the head, which readers treat as a linear layer of its own.
    The most frequent scheme applies to every linear layer (`targets: Linear`) that no other group names and `ignore` does not
    list.
    """
    places: dict[tuple[str, Scheme, str], list[str]] = {}
    forms: dict[tuple[str, Scheme, str], CompressedForm] = {}
    ignored = []
    for one in stored:
        name, base = one.views[0].name, one.name.removesuffix(".weight")
        if name in modules:
            module = modules[name]
            form = compressed_form(module, schemes[module])
            assert form is not None, schemes[module]
            key = (form.format, schemes[module], "Linear" if name in linear else "Embedding")
            forms[key] = form
            places.setdefault(key, []).extend([base, HEAD] if tied and module == EMBEDDING else [base])
        elif name in linear:
            ignored.append(base)
    if tied and EMBEDDING not in schemes:
        ignored.append(HEAD)
    groups: dict[str, Any] = {}
    counts = Counter({key: len(names) for key, names in places.items() if key[2] == "Linear"})
    common = counts.most_common(1)[0][0]
    for index, (key, names) in enumerate(sorted(places.items(), key=lambda item: item[0] == common)):
        groups[f"group_{index}"] = {
            "targets": ["Linear"] if key == common else [f"re:^{re.escape(name)}$" for name in names],
            "format": forms[key].format,
            "weights": forms[key].weights,
            "input_activations": forms[key].input_activations,
            "output_activations": None,
        }
    formats = {form.format for form in forms.values()}
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def read_settings(values: Mapping[str, Any], path: Path) -> Mapping[str, Any] | None:
    """The `quantization_config` of a config, checked as far as that needs no model; None where there is none.

    Raises ArtefactError for a kind that is not read here.
    """
    settings = values.get(QUANTIZATION)
    if not settings:
        return None
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    if method not in (COMPRESSED_TENSORS, BITSANDBYTES, OWN_FORM, *READ_FORMS):
        raise ArtefactError(
            f"{path}: the weights are quantised in a way that is not supported (quant_method {method!r}; supported: "
            f"{COMPRESSED_TENSORS}, {BITSANDBYTES} with nf4 or 8 bits, {', '.join(READ_FORMS)})"
        )
    if method in READ_FORMS:
        READ_FORMS[method].check(settings, path)
    nf4 = settings.get("load_in_4bit") and settings.get("bnb_4bit_quant_type") == "nf4"
    if method == BITSANDBYTES and not nf4 and not settings.get("load_in_8bit"):
        raise ArtefactError(
            f"{path}: the weights are quantised by bitsandbytes in another way than nf4 (load_in_4bit, bnb_4bit_quant_type: "
            "nf4) and LLM.int8 (load_in_8bit), which is not read here"
        )
    return settings


def _read_form(settings: Mapping[str, Any]) -> ReadForm | None:
    """The form of a folder that is only read; None of one that is written too."""
    if settings["quant_method"] == BITSANDBYTES and settings.get("load_in_8bit"):
        return LLM_INT8
    return READ_FORMS.get(settings["quant_method"])


def read_schemes(
    settings: Mapping[str, Any], stored: Sequence[Stored], modules: Mapping[str, str], linear: Sequence[str], path: Path
) -> dict[str, Scheme]:
    """The scheme of every quantised weight by the name of its module, as the settings describe it.

    modules: the module of each weight that can be quantised, by its tensor's name. Raises ArtefactError for a scheme that is
    not supported.
    """
    schemes: dict[str, Scheme] = {}
    if settings["quant_method"] == OWN_FORM:
        try:
            return {name: _described(values, path) for name, values in settings["modules"].items()}
        except (TypeError, AssertionError, KeyError, AttributeError):
            raise ArtefactError(f"{path}: {QUANTIZATION} is damaged") from None
    form = _read_form(settings)
    if form is None and settings["quant_method"] == BITSANDBYTES:
        codes = NF4(bool(settings.get("bnb_4bit_use_double_quant")))
        for one in stored:
            name, base = one.views[0].name, one.name.removesuffix(".weight")
            if name in modules and name in linear and modules[name] != HEAD and not is_skipped(settings, base):
                schemes[modules[name]] = codes
        return schemes
    if form is not None:
        for one in stored:
            name, base = one.views[0].name, one.name.removesuffix(".weight")
            left = modules.get(name) == HEAD or form.is_left(settings, base)
            if name in modules and name in linear and not left:
                schemes[modules[name]] = form.scheme(settings)
        return schemes
    groups = [group for group in settings.get("config_groups", {}).values() if isinstance(group, Mapping)]
    ignored = settings.get("ignore") or []
    patterns = FilePatterns(path)
    for one in stored:
        name, base = one.views[0].name, one.name.removesuffix(".weight")
        kind = "Linear" if name in linear else "Embedding"
        if name not in modules or any(_matches(patterns, target, base, kind) for target in ignored):
            continue
        # a target that names the module takes precedence over one that names its class
        named, classed = (
            [group for group in groups if any(_matches(patterns, target, base, each) for target in group.get("targets", ()))]
            for each in ("", kind)
        )
        if not named and not classed:
            continue
        scheme = _scheme((named or classed)[0], base, path)
        if schemes.setdefault(modules[name], scheme) != scheme:
            raise ArtefactError(f"{path}: {QUANTIZATION} gives parts of {modules[name]} schemes that differ")
    return schemes


def _described(values: Mapping[str, Any], path: Path) -> Scheme:
    """The scheme of `Scheme.described`. Raises ArtefactError for one that is not installed."""
    assert isinstance(values, Mapping), values
    try:
        if "scheme" in values:
            SCHEMES.find(values["scheme"])
    except ConfigError as error:
        raise ArtefactError(f"{path}: {QUANTIZATION}: {error}") from None
    described = first_scheme(lambda scheme: scheme.of_described(values))
    assert described is not None, values
    return described


def _matches(patterns: FilePatterns, target: Any, name: str, kind: str) -> bool:
    if isinstance(target, str) and target.startswith("re:"):
        return patterns.matches(target[3:], name, QUANTIZATION)
    return target in (kind, name)


def _scheme(group: Mapping[str, Any], name: str, path: Path) -> Scheme:
    weights, activations = group.get("weights") or {}, group.get("input_activations")
    found = first_scheme(lambda scheme: scheme.of_compressed(weights, activations))
    if found is None or group.get("output_activations") is not None:
        raise ArtefactError(
            f"{path}: {name} is quantised in a way that is not supported; supported: int8 by channel or group, int4 by group, "
            "int8 with int8 activations by token, and floats of 4 bits (nvfp4, mxfp4)"
        )
    return found


class Layout(NamedTuple):
    """The tensors of the files: those that are as in any model, those of codes; and the settings that say so.

    config: as the files give it. ignored: regular expressions of tensors that are not read.
    """

    plain: list[Stored]
    parts: list[StoredPart]
    settings: dict[str, Any]
    config: ModelConfig
    ignored: tuple[str, ...] = ()


class _Names(NamedTuple):
    """The network without its codes: tensors of the family's files, and our names."""

    stored: list[Stored]
    # by the tensor's name, the module of every weight that may be quantised
    modules: dict[str, str]
    # by the module
    shapes: dict[str, tuple[int, ...]]
    # tensors that are weights of linear layers, experts' included
    linear: list[str]


def _names(config: ModelConfig, family: Family) -> _Names:
    decoder = empty_decoder(config)
    shapes = dict(quantisable(decoder))
    for name in (EMBEDDING, HEAD):
        if hasattr(decoder, name):
            shapes[name] = tuple(getattr(decoder, name).weight.shape)
    modules = {weight_name(name): name for name in shapes}
    linear = [f"{name}.weight" for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
    linear += [name for name in modules if not name.endswith(".weight")]
    stored = list(family.stored(config, list(decoder.state_dict())))
    return _Names(stored, modules, shapes, linear)


def quantisable_weights(config: ModelConfig) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """The module of every weight that may be quantised, by its tensor's name, and its shape by the module."""
    names = _names(config, OWN)
    return names.modules, names.shapes


def layout_of(config: ModelConfig, schemes: Mapping[str, Scheme]) -> Layout:
    """The files of a model whose weights have these schemes, by module."""
    family, tied = family_of(config), config.tie_word_embeddings
    names = _names(config, family)
    modules = {tensor: module for tensor, module in names.modules.items() if module in schemes}
    if fits_compressed_tensors(names.stored, schemes, modules):
        settings = compressed_settings(names.stored, schemes, modules, names.linear, tied)
        return _laid_out(config, names, schemes, settings)
    if fits_bitsandbytes(names.stored, schemes, modules):
        return _laid_out(config, names, schemes, bitsandbytes_settings(names.stored, schemes, modules, names.linear))
    return _laid_out(
        config.with_changes(model_type=OWN.model_type), _names(config, OWN), schemes, own_settings(schemes, family.model_type)
    )


def read_layout(config: ModelConfig, settings: Mapping[str, Any], path: Path) -> tuple[Layout, dict[str, Scheme]]:
    """The files that these settings of `path` describe, and the schemes by module. Raises ArtefactError as `read_schemes`."""
    names = _names(config, OWN if settings["quant_method"] == OWN_FORM else family_of(config))
    schemes = read_schemes(settings, names.stored, names.modules, names.linear, path)
    return _laid_out(config, names, schemes, dict(settings)), schemes


def _laid_out(config: ModelConfig, names: _Names, schemes: Mapping[str, Scheme], settings: dict[str, Any]) -> Layout:
    form = _read_form(settings)
    own, packed = settings["quant_method"] == OWN_FORM, settings["quant_method"] == BITSANDBYTES and form is None
    plain: list[Stored] = []
    parts: list[StoredPart] = []
    for one in names.stored:
        module = names.modules.get(one.views[0].name)
        if module is None or module not in schemes:
            plain.append(one)
        elif packed:
            scheme = schemes[module]
            if not isinstance(scheme, NF4) or len(one.views) > 1 or one.views[0].view is not whole:
                raise ArtefactError(f"{one.name}: packed of several matrices, of which bitsandbytes' form is not read here")
            parts += bitsandbytes_parts(one, module, scheme, names.shapes[module])
        elif form is not None:
            parts += form.parts(one, module, schemes[module], names.shapes[module], settings)
        elif not own:
            parts += compressed_parts(one, module, schemes[module], names.shapes[module], config.tie_word_embeddings)
    if own:
        for module, scheme in schemes.items():
            parts += own_parts(module, scheme, names.shapes[module])
    # scales of activations, which stay floats or are quantised by what they are
    ignored = (r".*\.input_global_scale",) if settings["quant_method"] == COMPRESSED_TENSORS else ()
    return Layout(plain, parts, settings, config, ignored)


def schemes_of(decoder: Decoder) -> dict[str, Scheme]:
    """The scheme of every quantised weight of a decoder, by its module."""
    return {name: part.scheme for name, part in quantised_parts(decoder).items()}
