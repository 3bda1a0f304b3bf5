"""The stages that a recipe may name: those of our packages in the order in which data flows, and those of other packages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping

from bessemer.core.errors import ConfigError
from bessemer.core.registry import Plugin, Registry
from bessemer.core.stage import StageSpec
from bessemer.data import specs as data
from bessemer.evaluation import specs as evaluation
from bessemer.model import specs as model
from bessemer.posttraining import specs as posttraining
from bessemer.tokenization import specs as tokenization
from bessemer.training import specs as training

_OWN = tuple(spec for package in (data, tokenization, model, training, posttraining, evaluation) for spec in package.STAGES)

REGISTRY: Registry[StageSpec] = Registry(
    "stage", "bessemer.stages", (Plugin(spec.kind, spec.summary, spec, spec.config) for spec in _OWN)
)


class _Stages(MutableMapping[str, StageSpec]):
    """The registry's stages by kind; those of other packages are loaded when they are asked for."""

    def __init__(self, own: Iterable[StageSpec]) -> None:
        self._specs = {spec.kind: spec for spec in own}

    def __getitem__(self, kind: str) -> StageSpec:
        if kind in self._specs:
            return self._specs[kind]
        spec = REGISTRY[kind].load()
        if not isinstance(spec, StageSpec) or spec.kind != kind:
            raise ConfigError(f"the entry point {kind!r} of {REGISTRY.group} holds no stage of that kind")
        return spec

    def __setitem__(self, kind: str, spec: StageSpec) -> None:
        self._specs[kind] = spec

    def __delitem__(self, kind: str) -> None:
        del self._specs[kind]

    def __contains__(self, kind: object) -> bool:
        return kind in self._specs or kind in REGISTRY

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._specs, *REGISTRY]))

    def __len__(self) -> int:
        return len(list(iter(self)))


#: Every stage by its kind.
STAGES: MutableMapping[str, StageSpec] = _Stages(_OWN)


def example_of(kind: str) -> str:
    """A line for a recipe in which no stage makes a kind of artefact; empty where none is known."""
    return next((spec.example for spec in STAGES.values() if kind in spec.makes and spec.example), "")
