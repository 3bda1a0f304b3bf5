"""Settings of a merge: the method, the models with their weights, and values by layer; mergekit's files read as such settings.

A value may be a number; a list, which runs over the layers from the first to the last and is interpolated between (mergekit's
gradients); or a list of values with filters, of which the first that matches a tensor's name counts. Imports no PyTorch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BeforeValidator, Field, model_validator

from bessemer.core.config import Config, nearest, setting
from bessemer.core.errors import ConfigError

#: Raised whenever the weights that the stage `merge` makes of the same inputs change.
MERGE_VERSION = 1


class MergeMethod(NamedTuple):
    """needs_base: it merges differences from a base. density: it drops part of them. normalize: whether it divides by the sum
    of the weights by default. pair: it takes exactly two models."""

    summary: str
    needs_base: bool
    density: bool = False
    normalize: bool = False
    pair: bool = False


#: By the name that a recipe and `bessemer merge --method` take.
METHODS: Mapping[str, MergeMethod] = {
    "linear": MergeMethod("weighted mean of the weights (Wortsman et al. 2022, model soups)", needs_base=False, normalize=True),
    "slerp": MergeMethod("along the arc between two models' weights (Shoemake 1985)", needs_base=False, pair=True),
    "task_arithmetic": MergeMethod("base and weighted sum of the differences (Ilharco et al. 2023)", needs_base=True),
    "ties": MergeMethod(
        "the largest differences, where their signs agree (Yadav et al. 2023)", needs_base=True, density=True, normalize=True
    ),
    "dare_linear": MergeMethod(
        "differences dropped at random and scaled up, summed (Yu et al. 2024)", needs_base=True, density=True
    ),
    "dare_ties": MergeMethod("the same, summed where their signs agree", needs_base=True, density=True),
}

_SCALARS = (bool, int, float)


class FilteredValue(Config):
    """A value for the tensors whose names a filter matches."""

    value: float | list[float] = setting(..., "a number, or numbers from the first layer to the last, interpolated between")
    filter: str | None = setting(
        None, "part of a tensor's name (self_attn, mlp, layers.0.), or a pattern with *; none: all other tensors"
    )

    def matches(self, names: Sequence[str]) -> bool:
        """Whether one of a tensor's names is meant."""
        if self.filter in (None, "*"):
            return True
        assert self.filter is not None
        if any(sign in self.filter for sign in "*?["):
            return any(fnmatchcase(name, self.filter) for name in names)
        return any(self.filter in name for name in names)


Value = float | Annotated[list[float], Field(min_length=1)] | Annotated[list[FilteredValue], Field(min_length=1)]


def value_at(value: Value, names: Sequence[str], depth: float, what: str) -> float:
    """A setting's number for a tensor.

    names: the tensor's, in the family's files and in ours. depth: its layer's place, 0 the first layer and 1 the last; tensors
    outside the layers have 0, as in mergekit. Raises ConfigError, naming `what`, where no filter matches.
    """
    if isinstance(value, _SCALARS):
        return float(value)
    if all(isinstance(one, _SCALARS) for one in value):
        numbers = [float(one) for one in value]  # type: ignore[arg-type]
        place = depth * (len(numbers) - 1)
        first = min(int(place), len(numbers) - 1)
        rest = place - first
        return numbers[first] if not rest else (1 - rest) * numbers[first] + rest * numbers[first + 1]
    for one in value:
        assert isinstance(one, FilteredValue)
        if one.matches(names):
            return value_at(one.value, names, depth, what)
    raise ConfigError(f"{what}: no filter matches the tensor {names[0]!r}; end the list with a value without a filter")


class MergedModel(Config):
    """One of the models that are merged."""

    shorthand: ClassVar[str | None] = "model"

    model: str = setting(..., "a stage of the recipe that makes a model, or a folder, written with a slash (./NAME)")
    weight: Value = setting(1.0, "its weight; for linear relative to the sum of all weights")
    density: Value | None = setting(None, "share of its differences that are kept, 0 to 1; none: that of the merge")


def _as_model(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


def is_folder(name: str) -> bool:
    """Whether a model is named by its folder, and not by its stage."""
    return "/" in name or "\\" in name


class MergeConfig(Config):
    """A recipe's `merge:` section."""

    shorthand: ClassVar[str | None] = "models"

    method: Literal["linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties"] = setting(
        "linear", "; ".join(f"{name}: {method.summary}" for name, method in METHODS.items())
    )
    models: list[Annotated[MergedModel, BeforeValidator(_as_model)]] = setting(
        default_factory=list,
        description="the models, each a name or a name with a weight; empty: all that the stages above trained",
    )
    base: str | None = setting(None, "the model that the others were trained from, for all methods but linear and slerp")
    t: Value = setting(0.5, "slerp: 0 is the first model, 1 the second")
    density: Value = setting(1.0, "share of each model's differences that are kept: the largest by ties, at random by dare")
    normalize: bool | None = setting(
        None, "divide by the sum of the weights, with ties of those that agree in sign; none: linear and ties divide"
    )
    rescale: Literal["density", "l1", "none"] | None = setting(
        None,
        "how the kept differences are scaled: by 1 / density, as in DARE's paper (density), to their former sum of magnitudes, "
        "as in mergekit (l1), or not at all (the word none); absent: density for dare, not at all for ties",
    )
    factor: float = setting(1.0, "factor of the merged difference: the λ of task arithmetic and TIES")
    seed: int | None = setting(None, "seed of dare's dropping; none: the recipe's")
    dtype: Literal["float32", "float16", "bfloat16"] | None = setting(
        None, "dtype of the written weights; none: the first model's"
    )

    @model_validator(mode="after")
    def _fits(self) -> MergeConfig:
        method = METHODS[self.method]
        if method.needs_base and self.base is None:
            raise ValueError(f"{self.method} merges differences: name in base the model that the others were trained from")
        if method.needs_base and not self.models:
            raise ValueError(f"{self.method}: name in models what is merged over the base")
        if method.pair and self.models and len(self.models) != 2:
            raise ValueError(f"{self.method} merges two models, and {len(self.models)} are named")
        if len(self.models) == 1 and not method.needs_base:
            raise ValueError("one model alone: name at least two to merge")
        return self

    @property
    def normalizes(self) -> bool:
        """Whether sums are divided by the weights'."""
        return METHODS[self.method].normalize if self.normalize is None else self.normalize

    @property
    def rescaling(self) -> Literal["density", "l1", "none"]:
        """What differences are multiplied by after some were dropped."""
        return self.rescale or ("density" if self.method.startswith("dare") else "none")

    def stages(self) -> list[str]:
        """The stages that it names."""
        named = [one.model for one in self.models] + ([self.base] if self.base is not None else [])
        return list(dict.fromkeys(name for name in named if not is_folder(name)))

    def folders(self) -> list[str]:
        """The folders that it names."""
        named = [one.model for one in self.models] + ([self.base] if self.base is not None else [])
        return list(dict.fromkeys(name for name in named if is_folder(name)))


def describe(config: MergeConfig) -> str:
    """A line: the method, its models, and what is not a default."""
    parts = [one.model if one.weight == 1.0 else f"{one.model} ({_shown(one.weight)})" for one in config.models]
    base = f" over {config.base}" if config.base is not None else ""
    return f"{config.method} of {', '.join(parts)}{base}"


def _shown(value: Value) -> str:
    return f"{value:g}" if isinstance(value, _SCALARS) else "by layer"


# ---------------------------------------------------------------------------------------------------- mergekit's files

_MERGEKIT_PARAMETERS = {"t": "t", "density": "density", "normalize": "normalize", "lambda": "factor", "weight": "weight"}
#: Keys of mergekit that change nothing here.
_WITHOUT_EFFECT = ("int8_mask",)
_DTYPES = ("float32", "float16", "bfloat16")


def from_mergekit(values: Any, where: str) -> MergeConfig:
    """The settings that a file of mergekit asks for. Raises ConfigError, naming `where`, for what has no equal here."""
    if not isinstance(values, Mapping) or "merge_method" not in values:
        raise ConfigError(f"{where}: no merge: a mapping with merge_method and models, as mergekit reads")
    known = ("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype", "slices", "name")
    for name in values:
        if name not in known:
            raise ConfigError(f"{where}: {name}: has no equal here{nearest(str(name), list(known))}")
    if values.get("name"):
        raise ConfigError(f"{where}: name: a file of several merges; give each its own file")
    if (method := values["merge_method"]) not in METHODS:
        raise ConfigError(f"{where}: merge_method: there is no {method!r}{nearest(str(method), list(METHODS))}")
    base, shared = values.get("base_model"), _parameters(values.get("parameters"), where)
    # slerp counts from the base, which may be among the models or not
    listed = [_mergekit_model(one, where) for one in _listed(values, where)]
    if method == "slerp":
        if base is None:
            raise ConfigError(f"{where}: slerp needs base_model, from which t counts")
        listed = [{"model": base}, *(one for one in listed if one["model"] != base)]
        base = None
    elif METHODS[method].needs_base:
        listed = [one for one in listed if one["model"] != base]
    else:
        base = None
    if (weight := shared.pop("weight", None)) is not None:
        listed = [{"weight": weight} | one for one in listed]
    if method != "slerp" and any("weight" not in one for one in listed):
        missing = next(one["model"] for one in listed if "weight" not in one)
        raise ConfigError(f"{where}: {missing}: parameters: weight is missing")
    rescale = shared.pop("rescale", method.startswith("dare"))
    dtype = values.get("out_dtype") or values.get("dtype")
    if dtype is not None and dtype not in _DTYPES:
        raise ConfigError(f"{where}: dtype: there is no {dtype!r}; {', '.join(_DTYPES)}")
    settings = {"method": method, "models": listed, "base": base, "dtype": dtype, "rescale": "l1" if rescale else "none"}
    return MergeConfig.parse(settings | shared, where)


def _listed(values: Mapping[str, Any], where: str) -> list[Any]:
    """The models: under `models`, or the sources of a single slice that is whole."""
    if values.get("models"):
        return list(values["models"])
    slices = values.get("slices") or []
    sources = slices[0].get("sources", []) if len(slices) == 1 and isinstance(slices[0], Mapping) else []
    ranges = {tuple(one.get("layer_range", ())) for one in sources if isinstance(one, Mapping)}
    if not sources or len(ranges) > 1 or any(start for start, *_ in ranges):
        raise ConfigError(
            f"{where}: slices: only one slice with the same layers of every model is merged; layers of several depths are not "
            "stacked here"
        )
    return [{name: value for name, value in one.items() if name != "layer_range"} for one in sources]


def _mergekit_model(one: Any, where: str) -> dict[str, Any]:
    if not isinstance(one, Mapping) or not isinstance(one.get("model"), str):
        raise ConfigError(f"{where}: models: each is a mapping with model and parameters")
    if re.search(r"[^/\\]\+[^/\\]", one["model"]) and not Path(one["model"]).exists():
        raise ConfigError(f"{where}: {one['model']}: name what finetune wrote, or merge the adapter first: bessemer merge")
    own = _parameters(one.get("parameters"), where)
    for name in own:
        if name not in ("weight", "density"):
            raise ConfigError(f"{where}: {one['model']}: {name} is a setting of the whole merge; put it under parameters")
    return {"model": one["model"], **own}


def _parameters(given: Any, where: str) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: parameters: a mapping of names and values")
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name in _WITHOUT_EFFECT:
            continue
        if name == "rescale":
            found[name] = bool(value)
        elif name in _MERGEKIT_PARAMETERS:
            # one filtered value may stand without a list
            found[_MERGEKIT_PARAMETERS[name]] = [value] if isinstance(value, Mapping) else value
        else:
            raise ConfigError(f"{where}: parameters: there is no {name!r}{nearest(str(name), list(_MERGEKIT_PARAMETERS))}")
    return found
