"""`quantization_config` of a model's `config.json`: which weights are quantised, and how."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.model.families.layout import Stored
from bessemer.model.file_patterns import FilePatterns
from bessemer.model.quantisation.quantised_modules import EMBEDDING, HEAD
from bessemer.model.quantisation.registry import SCHEMES, first_scheme
from bessemer.model.quantisation.schemes.base import CompressedForm, Scheme
from bessemer.model.quantisation.stored import compressed_form

#: Key of `config.json`.
QUANTIZATION = "quantization_config"
#: The two ways of keeping codes.
COMPRESSED_TENSORS, OWN_FORM = "compressed-tensors", "bessemer"


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
    """For a folder in the form of compressed-tensors.

    modules: the module of each quantised weight by its tensor's name. linear: our names of all weights of linear layers.
    tied: whether the embedding is the head too, which readers know as a linear layer of its own.
    The most frequent scheme is that of every linear layer (`targets: Linear`), but for those that another group names or
    `ignore` lists.
    """
    places: dict[tuple[str, Scheme, str], list[str]] = {}
    forms: dict[tuple[str, Scheme, str], CompressedForm] = {}
    ignored = []
    for one in stored:
        name, base = one.places[0].name, one.name.removesuffix(".weight")
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
    if method not in (COMPRESSED_TENSORS, OWN_FORM):
        raise ArtefactError(
            f"{path}: the weights are quantised in a way that is not supported (quant_method {method!r}; supported: "
            f"{COMPRESSED_TENSORS})"
        )
    return settings


def read_schemes(
    settings: Mapping[str, Any], stored: Sequence[Stored], modules: Mapping[str, str], linear: Sequence[str], path: Path
) -> dict[str, Scheme]:
    """The scheme of every quantised weight by the name of its module, as the settings describe it.

    modules: the module of each weight that can be quantised, by its tensor's name. Raises ArtefactError for a scheme that is
    not supported.
    """
    found: dict[str, Scheme] = {}
    if settings["quant_method"] == OWN_FORM:
        try:
            return {name: _described(values, path) for name, values in settings["modules"].items()}
        except (TypeError, AssertionError, KeyError, AttributeError):
            raise ArtefactError(f"{path}: {QUANTIZATION} is damaged") from None
    groups = [group for group in settings.get("config_groups", {}).values() if isinstance(group, Mapping)]
    ignored = settings.get("ignore") or []
    patterns = FilePatterns(path)
    for one in stored:
        name, base = one.places[0].name, one.name.removesuffix(".weight")
        kind = "Linear" if name in linear else "Embedding"
        if name not in modules or any(_matches(patterns, target, base, kind) for target in ignored):
            continue
        # a target that names the module goes before one that names its class
        named, classed = (
            [group for group in groups if any(_matches(patterns, target, base, each) for target in group.get("targets", ()))]
            for each in ("", kind)
        )
        if not named and not classed:
            continue
        scheme = _scheme((named or classed)[0], base, path)
        if found.setdefault(modules[name], scheme) != scheme:
            raise ArtefactError(f"{path}: {QUANTIZATION} gives parts of {modules[name]} schemes that differ")
    return found


def _described(values: Mapping[str, Any], path: Path) -> Scheme:
    """The scheme of `Scheme.described`. Raises ArtefactError for one that is not installed."""
    assert isinstance(values, Mapping), values
    try:
        if "scheme" in values:
            SCHEMES.find(values["scheme"])
    except ConfigError as error:
        raise ArtefactError(f"{path}: {QUANTIZATION}: {error}") from None
    found = first_scheme(lambda scheme: scheme.of_described(values))
    assert found is not None, values
    return found


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
            "and int8 with int8 activations by token"
        )
    return found
