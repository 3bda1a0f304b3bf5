"""A stage of the pipeline: its settings, what it reads, what it makes, and the function that does it.

Each package describes its stages in its `specs.py` as `STAGES`, and the pipeline collects them. Another package adds a stage by
an entry point of the group `bessemer.stages`, whose object is a `Plugin` with a `StageSpec`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from bessemer.core.config import Config, nearest
from bessemer.core.errors import ConfigError
from bessemer.core.progress import Progress
from bessemer.core.report import KeyFigure, Metrics, ReportFunction, StageReport, facts_section

SomeConfig = TypeVar("SomeConfig", bound=Config)


@dataclass(frozen=True)
class Input:
    """An artefact that a stage reads: the one of kind `kind` that the stage named `stage` makes."""

    stage: str
    kind: str


@dataclass(frozen=True)
class Outside:
    """Access to sources outside the pipeline, for a stage's fingerprint: the folder of relative paths, the download cache.

    fetch: False in a dry run, which downloads nothing and assumes that downloads will succeed.
    """

    folder: Path
    cache: Path
    fetch: bool
    progress: Progress


class ItemScore(NamedTuple):
    """The score of an item, from 0 to 1, and the cluster of items that it belongs to, None where it is its own."""

    score: float
    cluster: str | None = None


class TaskScorer(Protocol):
    """Evaluates a model on tasks between two steps of its training."""

    def check(self, tokenizer: Path, context_length: int) -> None:
        """Raise ConfigError when their prompts cannot be written with the tokenizer of a folder."""

    def accuracies(self, model: Any, tokenizer: Path) -> dict[str, float]:
        """Accuracy by task of a model with its current weights. tokenizer: its folder."""

    def item_scores(self, model: Any, tokenizer: Path) -> dict[str, dict[str, ItemScore]]:
        """The same by task and item, for a comparison of two models; items without a score are left out."""


#: Opens tasks: (names or files, folder of their data or None for their own, most items of each). Raises ConfigError for an
#: unknown task, ArtefactError for missing data.
OpenTasks = Callable[[Sequence[str], Path | None, int], TaskScorer]


@dataclass(frozen=True)
class Services:
    """Functions of packages that come after a stage's own, which the pipeline passes in.

    None where a stage runs without the pipeline.

    open_language_model: (model folder, device) → a scorer of documents, texts → bits per byte.
    continuations: (model in training, folder of its tokenizer, prompts) → the texts that it generates.
    card_flops: name of a GPU → the vendor's FLOP/s in bfloat16, None for an unknown GPU.
    tasks: opens the tasks that evaluate a model during training.
    """

    open_language_model: Callable[[Path, str], Any] | None = None
    continuations: Callable[[Any, Path, list[str]], list[str]] | None = None
    card_flops: Callable[[str], float | None] = lambda name: None
    tasks: OpenTasks | None = None


@dataclass(frozen=True)
class StageContext:
    """The input of a stage's function.

    inputs: role → path of the artefact that feeds it. out: the folder to write into.
    folder: where relative paths of the settings start.
    measured: the measurements by which `resolve` has just chosen settings; None for explicit settings, or ones measured in an
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
    unread: roles of `needs` that the stage does not read under its settings.
    makes: kind of artefact → its path in the stage's folder. lacks: kinds of `makes` that it does not make under its settings →
    why not.
    links: name of a link at the top of a run's folder → its target in the stage's folder.
    example: a line that adds this stage to a recipe.
    remedy: what to do with this stage's output after a document is removed from the corpus.
    budget_seconds: its share of the quickstart's ten minutes on two quiet cores.

    report: its section of the report, by default the figures in its manifest. summary_line: manifest's metrics → a line for the
    table of stages. sentences, key_figures: for the head of the report. next_steps: commands that continue from it.

    resolve: for a stage whose settings may say `auto` or `minutes` (their `resolved` is then False): measures once and returns
    settings without these. fingerprint: what, besides settings and inputs, the output depends on (the files of a source).
    models_named: the stages whose models the settings name, for a stage that compares them; an empty list means every trained
    model above. conflict: why the settings do not fit those of the stages above (name → settings); None when they do.
    conflict_of_files: the same, decided by files that the settings name; their paths start from the folder.
    unusable: why an input (role → path; cache) cannot be used, checked as soon as it exists. packages: optional modules that
    the stage imports under its settings. check: raises ConfigError when the machine lacks anything else that the settings need.
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
