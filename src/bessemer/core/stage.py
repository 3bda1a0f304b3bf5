"""What a stage is: its settings, what it needs, what it makes, and the function that does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bessemer.core.config import Config, nearest
from bessemer.core.errors import ConfigError
from bessemer.core.progress import Progress


@dataclass(frozen=True)
class Input:
    """One artefact that a stage reads: what the stage `stage` makes of kind `kind`."""

    stage: str
    kind: str


@dataclass(frozen=True)
class Outside:
    """What a stage's sources are looked up with: the folder that their paths start from, and the download cache.

    `fetch=False`: a dry run, which downloads nothing and supposes that what can be fetched will be.
    """

    folder: Path
    cache: Path
    fetch: bool
    progress: Progress


@dataclass(frozen=True)
class StageContext:
    """What a stage's function is given.

    measured: what its settings were measured by a moment ago; None where they were explicit, or measured in an earlier run.
    """

    config: Any
    inputs: dict[str, Path]
    out: Path
    folder: Path
    cache: Path
    seed: int
    device: str
    progress: Progress
    measured: dict[str, Any] | None = None


@dataclass(frozen=True)
class StageSpec:
    """A kind of stage that a recipe may name.

    `needs`: role → kind of artefact; a kind that ends in "?" may be missing. The first role is the one that `from`
    chooses. `makes`: kind → where it lies in the stage's folder. `resolve`: for a stage whose settings may say `auto`
    or `minutes` (their `resolved` is then False): measures once and gives settings without them. `fingerprint`: what,
    besides settings and inputs, the output depends on (the files of a source). `models_named`: the stages whose models
    the settings name, for a stage that compares them; an empty list means every trained model above. `conflict`: what
    in the settings cannot go with those of the stages above, by name, in words; None when all is well. `conflict_of_files`:
    the same where files that the settings name decide it; their paths start from the folder. `unusable`: what makes an input
    (role → path; the cache) of no use to the stage, looked at as soon as that input is there. `packages`: the modules that
    the stage imports under its settings and that may not be installed. `check`: raises ConfigError when the machine lacks
    anything else that the settings need.
    """

    name: str
    config: type[Config]
    version: int
    needs: dict[str, str]
    makes: dict[str, str]
    run: Callable[[StageContext], dict[str, Any]]
    uses_seed: bool = False
    resumes: bool = False
    trains: bool = False
    resolve: Callable[[StageContext], tuple[Config, dict[str, Any]]] | None = None
    fingerprint: Callable[[Any, Outside], Any] = lambda config, outside: None
    models_named: Callable[[Any], list[str]] | None = None
    conflict: Callable[[Any, Mapping[str, Any]], str | None] = lambda config, above: None
    conflict_of_files: Callable[[Any, Mapping[str, Any], Path], str | None] = lambda config, above, folder: None
    unusable: Callable[[Any, Mapping[str, Path], Path], str | None] = lambda config, inputs, cache: None
    packages: Callable[[Any], Sequence[str]] = lambda config: ()
    check: Callable[[Any], None] = lambda config: None

    def wire(
        self, config: Config, above: Sequence[StageSpec], source: str | None, where: Callable[[], str]
    ) -> dict[str, Input]:
        """Which stage above feeds each role. Raises ConfigError when one is missing or cannot feed it.

        Roles: those of `needs`, and `model:NAME` for each model that the settings name.
        """
        inputs: dict[str, Input] = {}
        for position, (role, wanted) in enumerate(self.needs.items()):
            kind = wanted.removesuffix("?")
            if position == 0 and source is not None:
                inputs[role] = _named(source, kind, above, where)
                continue
            maker = next((spec for spec in reversed(above) if kind in spec.makes), None)
            if maker is not None:
                inputs[role] = Input(maker.name, kind)
            elif not wanted.endswith("?"):
                raise ConfigError(f"{where()}: needs {kind}, and no stage above makes it")
        if source is not None and not self.needs:
            raise ConfigError(f"{where()}: reads nothing from another stage, so 'from' has no meaning")
        if self.models_named is not None:
            named = self.models_named(config) or [spec.name for spec in above if spec.trains]
            for name in named:
                inputs[f"model:{name}"] = _named(name, "model", above, where)
        return inputs


def _named(name: str, kind: str, above: Sequence[StageSpec], where: Callable[[], str]) -> Input:
    names = [spec.name for spec in above]
    if name not in names:
        raise ConfigError(f"{where()}: there is no stage {name!r} above it{nearest(name, names)}")
    spec = next(spec for spec in above if spec.name == name)
    if kind not in spec.makes:
        raise ConfigError(f"{where()}: the stage {name!r} makes {', '.join(spec.makes)}, not {kind}")
    return Input(name, kind)
