"""A stage of the pipeline: its settings, what it reads, what it makes, and the function that does it.

Each package describes its stages in its `specs.py` as `STAGES`, and the pipeline collects them. Another package adds a stage by
an entry point of the group `bessemer.stages`, whose object is a `Plugin` with a `StageSpec`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from bessemer.core.config import Config, nearest
from bessemer.core.errors import ConfigError
from bessemer.core.progress import Progress
from bessemer.core.report import KeyFigure, Metrics, ReportFunction, StageReport, facts_section

SomeConfig = TypeVar("SomeConfig", bound=Config)


@dataclass(frozen=True)
class Input:
    """One artefact that a stage reads: what the stage `stage` makes of kind `kind`."""

    stage: str
    kind: str


@dataclass(frozen=True)
class Outside:
    """Where a stage looks up its sources: the folder that their paths start from, and the download cache.

    `fetch=False`: a dry run, which downloads nothing and supposes that what can be fetched will be.
    """

    folder: Path
    cache: Path
    fetch: bool
    progress: Progress


class TaskScorer(Protocol):
    """Tasks with their data, asked of a model between two steps of its training."""

    def check(self, tokenizer: Path, context_length: int) -> None:
        """Raise ConfigError when their prompts cannot be written with the tokenizer of a folder."""

    def accuracies(self, model: Any, tokenizer: Path) -> dict[str, float]:
        """Accuracy by task of a model with its present weights, whose tokenizer lies in a folder."""


#: Opens tasks by names or files, with the folder of their data (None: their own) and the most items of each. Raises
#: ConfigError for a task that there is not, ArtefactError for data that is missing.
OpenTasks = Callable[[Sequence[str], Path | None, int], TaskScorer]


@dataclass(frozen=True)
class Services:
    """Functions of packages that come after a stage's own, which the pipeline passes in.

    None where a stage runs without the pipeline.

    open_language_model: from a model's folder and a device to a scorer of documents, texts → bits per byte.
    continuations: from a model in training, the folder of its tokenizer and prompts to what it writes after them.
    card_flops: FLOP/s that a GPU of a name promises in bfloat16, None for an unknown one.
    tasks: opens the tasks that a model answers while it is trained.
    """

    open_language_model: Callable[[Path, str], Any] | None = None
    continuations: Callable[[Any, Path, list[str]], list[str]] | None = None
    card_flops: Callable[[str], float | None] = lambda name: None
    tasks: OpenTasks | None = None


@dataclass(frozen=True)
class StageContext:
    """What a stage's function is given.

    inputs: role → path of the artefact that feeds it. out: the folder to write into.
    folder: where relative paths of the settings start.
    measured: the figures by which the settings were resolved a moment ago; None where they were explicit, or measured in an
    earlier run.
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
    services: Services = Services()


@dataclass(frozen=True)
class StageSpec:
    """A kind of stage that a recipe may name.

    kind: the key in a recipe, or the `kind` of a stage with a name of its own. summary: one line for the reference.
    needs: role → kind of artefact; a kind that ends in "?" may be missing. The first role is the one that `from: STAGE`
    chooses; `from: {ROLE: STAGE}` chooses any.
    unread: the roles of these that the stage does not read under its settings.
    makes: kind of artefact → where it lies in the stage's folder. lacks: kinds of these that it does not make under its
    settings → why not.
    links: link at the top of a run's folder → where it leads in the stage's folder.
    example: a line to add to a recipe that lacks what this stage makes.
    remedy: what to do with what this stage made of a document that is removed from the corpus.
    budget_seconds: its share of the quickstart's ten minutes on two quiet cores.

    report: its section of the report; the figures in its manifest where it has no other. summary_line: from the manifest's
    metrics to what it made, for the table of stages. sentences, key_figures: what the head of the report says. next_steps:
    commands that go on from it.

    resolve: for a stage whose settings may say `auto` or `minutes` (their `resolved` is then False): measures once and gives
    settings without them. fingerprint: what, besides settings and inputs, the output depends on (the files of a source).
    models_named: the stages whose models the settings name, for a stage that compares them; an empty list means every trained
    model above. conflict: what in the settings cannot go with those of the stages above, by name, in words; None when all
    is well. conflict_of_files: the same where files that the settings name decide it; their paths start from the folder.
    unusable: what makes an input (role → path; the cache) of no use to the stage, looked at as soon as that input is
    there. packages: the modules that the stage imports under its settings and that may not be installed. check: raises
    ConfigError when the machine lacks anything else that the settings need.
    """

    kind: str
    summary: str
    config: type[Config]
    version: int
    needs: dict[str, str]
    makes: dict[str, str]
    run: Callable[[StageContext], dict[str, Any]]
    links: Mapping[str, str] = field(default_factory=dict)
    example: str = ""
    remedy: str = "make again"
    budget_seconds: float | None = None
    report: ReportFunction = facts_section
    summary_line: Callable[[Metrics], str] = lambda metrics: ""
    sentences: Callable[[StageReport], Sequence[str]] = lambda stage: ()
    key_figures: Callable[[StageReport], Sequence[KeyFigure]] = lambda stage: ()
    next_steps: Callable[[StageReport], Sequence[str]] = lambda stage: ()
    uses_seed: bool = False
    resumes: bool = False
    trains: bool = False
    resolve: Callable[[StageContext], tuple[Config, dict[str, Any]]] | None = None
    fingerprint: Callable[[Any, Outside], Any] = lambda config, outside: None
    models_named: Callable[[Any], list[str]] | None = None
    unread: Callable[[Any], Collection[str]] = lambda config: ()
    lacks: Callable[[Any], Mapping[str, str]] = lambda config: {}
    conflict: Callable[[Any, Mapping[str, Any]], str | None] = lambda config, above: None
    conflict_of_files: Callable[[Any, Mapping[str, Any], Path], str | None] = lambda config, above, folder: None
    unusable: Callable[[Any, Mapping[str, Path], Path], str | None] = lambda config, inputs, cache: None
    packages: Callable[[Any], Sequence[str]] = lambda config: ()
    check: Callable[[Any], None] = lambda config: None

    def wire(
        self,
        config: Config,
        above: Mapping[str, StageSpec],
        sources: str | Mapping[str, str] | None,
        where: Callable[[], str],
        example_of: Callable[[str], str] = lambda kind: "",
    ) -> dict[str, Input]:
        """Which stage above feeds each role: the one that `sources` names, or the nearest that makes what it needs.

        above: the stages above by name, in order. sources: the recipe's `from`, a stage for the first role or role → stage.
        example_of: a line for a recipe in which no stage makes a kind of artefact. Roles: those of `needs`, and `model:NAME`
        for each model that the settings name. Raises ConfigError when a stage is missing or cannot feed a role.
        """
        chosen = self._chosen(sources, where)
        inputs: dict[str, Input] = {}
        unread = self.unread(config)
        for role, wanted in self.needs.items():
            if role in unread:
                if role in chosen:
                    raise ConfigError(f"{where()}: from: {role} is not read under these settings; leave it out, or change them")
                continue
            kind = wanted.removesuffix("?")
            if role in chosen:
                inputs[role] = _named(chosen[role], kind, above, where)
                continue
            maker = next((name for name in reversed(list(above)) if kind in above[name].makes), None)
            if maker is not None:
                inputs[role] = Input(maker, kind)
            elif not wanted.endswith("?"):
                example = example_of(kind)
                hint = f"; add {example}" if example else ""
                raise ConfigError(f"{where()}: needs {kind}, and no stage above makes it{hint}")
        if self.models_named is not None:
            for name in self.models_named(config) or [
                name for name, spec in above.items() if spec.trains and "model" in spec.makes
            ]:
                inputs[f"model:{name}"] = _named(name, "model", above, where)
        return inputs

    def _chosen(self, sources: str | Mapping[str, str] | None, where: Callable[[], str]) -> Mapping[str, str]:
        """Role → stage, as the recipe's `from` says."""
        if sources is None:
            return {}
        if not self.needs:
            raise ConfigError(f"{where()}: reads nothing from another stage, so 'from' has no meaning")
        if isinstance(sources, str):
            return {next(iter(self.needs)): sources}
        unknown = next((role for role in sources if role not in self.needs), None)
        if unknown is not None:
            raise ConfigError(f"{where()}: from: there is no role {unknown!r}{nearest(unknown, list(self.needs))}")
        return sources


def _named(name: str, kind: str, above: Mapping[str, StageSpec], where: Callable[[], str]) -> Input:
    if name not in above:
        raise ConfigError(f"{where()}: there is no stage {name!r} above it{nearest(name, list(above))}")
    makes = above[name].makes
    if kind not in makes:
        raise ConfigError(f"{where()}: the stage {name!r} makes {', '.join(makes)}, not {kind}")
    return Input(name, kind)


def last_of(above: Mapping[str, Any], kind: type[SomeConfig]) -> SomeConfig | None:
    """The settings of the nearest stage above that has settings of a class; None where there is none."""
    return next((config for config in reversed(list(above.values())) if isinstance(config, kind)), None)
