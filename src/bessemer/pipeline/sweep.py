"""Sweeps: one recipe many times, with other values of some settings; finished runs as points of a scaling law.

Every member is a run with a name of its own. Members share the store, so stages that the varied settings do not touch are made
once. A member that fails does not stop the others, and the same sweep again resumes with what is missing. A point has the
parameters, tokens and final loss of a run, from its manifests.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from bessemer.core.errors import ArtefactError, BessemerError, ConfigError
from bessemer.core.progress import Progress, Silent
from bessemer.core.store import write_text
from bessemer.pipeline.api import execute, prepare
from bessemer.pipeline.recipe import load_recipe
from bessemer.pipeline.run_folder import RunFolder
from bessemer.pipeline.runner import Runner
from bessemer.scaling.ladder import counted
from bessemer.scaling.laws.parametric import DegenerateError, Point, Points

#: A run's losses on the validation split, at the end of training.
LOSSES = ("bits_per_byte", "validation_loss")


@dataclass(frozen=True)
class TrainedRun:
    """Figures of a finished pretraining. parameters: those that a token meets. losses: those of `LOSSES` that were measured.

    flops: of the training, by the model's own count (`ModelConfig.flops_per_token`), attention included.
    """

    name: str
    parameters: int
    non_embedding_parameters: int
    tokens: int
    flops: float
    losses: dict[str, float]
    seconds: float


def trained_run(folder: Path) -> TrainedRun:
    """The pretraining of a run's folder: of several stages the last one's loss, with the tokens of all.

    Earlier losses do not count: they were measured before the learning rate's decay. Raises ArtefactError where no pretraining
    is finished.
    """
    from bessemer.model.storage.model_config import read_model_config

    run = RunFolder(folder.parent, folder.name)
    run.record()
    stages: list[tuple[Path, dict[str, Any]]] = []
    for name, place in run.stages().items():
        manifest = run.manifest(name)
        if manifest is not None and manifest["stage"] == "pretrain":
            stages.append((place, manifest))
    if not stages:
        raise ArtefactError(f"{folder}: the run has no finished stage pretrain, so no point")
    place, manifest = stages[-1]
    model = read_model_config(place / "model")
    tokens = sum(int(stage_manifest["metrics"]["tokens"]) for _, stage_manifest in stages)
    context = int(manifest["settings"]["context_length"])
    return TrainedRun(
        run.name,
        counted(model, "all"),
        counted(model, "non-embedding"),
        tokens,
        float(model.flops_per_token(context)) * tokens,
        {name: float(manifest["metrics"][name]) for name in LOSSES if name in manifest["metrics"]},
        float(sum(stage_manifest["seconds"] for _, stage_manifest in stages)),
    )


def points_of_runs(folders: Sequence[Path], *, count: str, metric: str) -> Points:
    """The points of runs. Raises ArtefactError for one without a finished pretraining, DegenerateError for one without the
    loss."""
    points = []
    for folder in folders:
        run = trained_run(folder)
        if metric not in run.losses:
            raise DegenerateError(f"{folder}: its pretraining measured no {metric}")
        parameters = run.parameters if count == "all" else run.non_embedding_parameters
        point = Point(parameters, run.tokens, run.losses[metric], run.flops)
        if (problem := point.problem()) is not None:
            raise DegenerateError(f"{folder}: {problem}")
        points.append(point)
    return Points(tuple(points))


#: Longest name of a member; a longer one is cut and ends in a hash.
_LONGEST_NAME = 100


@dataclass(frozen=True)
class Member:
    """One run of a sweep. name: its own. base: the common beginning of all runs' names. overrides: all of its settings. varied:
    values of the settings that differ between runs."""

    name: str
    base: str
    overrides: tuple[str, ...]
    varied: Mapping[str, str]


@dataclass(frozen=True)
class Outcome:
    """Result of a member. run: its pretraining, where it has one. problem: why it failed."""

    member: Member
    run: TrainedRun | None = None
    problem: str | None = None

    @property
    def status(self) -> str:
        """`done` or `failed`."""
        return "done" if self.problem is None else "failed"


def members(
    recipe: str,
    overrides: Sequence[str],
    *,
    seeds: int = 1,
    zipped: Sequence[Sequence[str]] = (),
    name: str | None = None,
    allow_code: bool = False,
) -> list[Member]:
    """The members of a sweep: every combination of the values of `KEY=A,B,C` overrides.

    zipped: groups of keys whose values go together one by one, as the width and depth of a ladder do. seeds: how many, from
    the recipe's own on. name: what members' names begin with; None: the recipe's name. Raises ConfigError.
    """
    axes: dict[str, list[str]] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{text!r}: a setting to sweep is KEY=A,B,C, as in pretrain.learning_rate=1e-3,3e-3")
        if key.strip() in axes:
            raise ConfigError(f"{text!r}: {key.strip()} is given twice")
        axes[key.strip()] = split_values(value)
    # loading the first combination refuses invalid values, and gives the recipe's seed
    first = load_recipe(recipe, [f"{key}={values[0]}" for key, values in axes.items()], allow_code=allow_code)
    if seeds > 1:
        if "seed" in axes:
            raise ConfigError("seed is swept by itself: leave out --seeds, or seed=")
        axes["seed"] = [str(first.head.seed + offset) for offset in range(seeds)]
    combinations = list(_combinations(axes, zipped))
    varying = [key for key, values in axes.items() if len(values) > 1]
    return [_member(name or first.name, combination, varying) for combination in combinations]


def split_values(text: str) -> list[str]:
    """`a,b,[c, d]` at the commas that no bracket, brace or quote holds. Raises ConfigError for an empty value."""
    values, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        if character == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += character
    values = [value.strip() for value in values]
    if not all(values):
        raise ConfigError(f"{text!r}: a value of the list is empty")
    return values


def _combinations(axes: Mapping[str, list[str]], zipped: Sequence[Sequence[str]]) -> Iterator[dict[str, str]]:
    groups: list[list[dict[str, str]]] = []
    together = {key for group in zipped for key in group}
    for group in zipped:
        for key in group:
            if key not in axes:
                raise ConfigError(f"--zip {','.join(group)}: {key} has no values here")
        lengths = {key: len(axes[key]) for key in group}
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f"{key} {length}" for key, length in lengths.items())
            raise ConfigError(f"--zip {','.join(group)}: the lists have different lengths ({counts})")
        rows = zip(*(axes[key] for key in group), strict=True)
        groups.append([dict(zip(group, row, strict=True)) for row in rows])
    groups += [[{key: value} for value in values] for key, values in axes.items() if key not in together]
    for values in groups:
        for number, value in enumerate(values):
            if value in values[:number]:
                twice = " ".join(f"{key}={each}" for key, each in value.items())
                raise ConfigError(f"{twice}: is given twice")
    for combination in product(*groups):
        chosen = {key: value for part in combination for key, value in part.items()}
        yield {key: chosen[key] for key in axes}


def _member(base: str, values: Mapping[str, str], varying: Sequence[str]) -> Member:
    short = {key: key.rpartition(".")[2] for key in varying}
    words = [key if list(short.values()).count(short[key]) > 1 else short[key] for key in varying]
    parts = [f"{word}-{values[key]}" for word, key in zip(words, varying, strict=True)]
    whole = "-".join([base, *parts])
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", whole)
    if name != whole or len(name) > _LONGEST_NAME:
        # different values may give the same cleaned name
        name = f"{name[: _LONGEST_NAME - 9]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
    overrides = tuple(f"{key}={value}" for key, value in values.items())
    return Member(name, base, overrides, {key: values[key] for key in varying})


def sweep(
    recipe: str,
    chosen: Sequence[Member],
    *,
    runs: Path | str = "runs",
    until: str | None = None,
    allow_code: bool = False,
    progress: Progress | None = None,
    on_outcome: Callable[[list[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """Run the members one after the other.

    All are checked before the first one runs; a ConfigError then stops the sweep. on_outcome: called with the outcomes so far
    after every member.
    """
    report = progress or Silent()
    prepare_member = partial(prepare, recipe, runs=runs, until=until, allow_code=allow_code)
    for member in chosen:
        try:
            prepare_member(member.overrides, name=member.name)
        except BessemerError as error:
            raise ConfigError(f"{member.name}: {error}") from None
    outcomes: list[Outcome] = []
    for number, member in enumerate(chosen, start=1):
        report.say(f"[{number}/{len(chosen)}] {member.name}")
        outcomes.append(_run(member, partial(prepare_member, progress=report, claim=True), until))
        if outcomes[-1].problem is not None:
            report.say(f"{member.name}: failed: {outcomes[-1].problem}")
        on_outcome(outcomes)
    return outcomes


def _run(member: Member, prepare_member: Callable[..., Runner], until: str | None) -> Outcome:
    try:
        runner = prepare_member(member.overrides, name=member.name)
        if not _finished(runner, until):
            execute(runner, until=until)
    except Exception as error:  # the others go on, whatever it is
        return Outcome(member, problem=_line(error))
    try:
        run = trained_run(runner.run_folder.folder)
    except (ArtefactError, KeyError):
        run = None
    return Outcome(member, run)


def _finished(runner: Runner, until: str | None) -> bool:
    """Whether a run before this one has made and linked everything."""
    keys = {name: entry["key"] for name, entry in runner.run_folder.record().get("stages", {}).items()}
    return all(plan.action == "reuse" and keys.get(plan.stage.name) == plan.key for plan in runner.plan(until))


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, BessemerError) else f"{type(error).__name__}: {text[:300]}"


_COLUMNS = ("parameters", "non_embedding_parameters", "tokens", "flops", *LOSSES)


def sweep_rows(outcomes: Sequence[Outcome], metric: str = "bits_per_byte") -> list[dict[str, Any]]:
    """One row a member, for a table or a CSV: its name, what varied, its point of a scaling law (`loss` is `metric`)."""
    rows = []
    for outcome in outcomes:
        row: dict[str, Any] = {"run": outcome.member.name, "status": outcome.status, **outcome.member.varied}
        run = outcome.run
        losses = {} if run is None else run.losses
        row |= {name: losses.get(name) if name in LOSSES else getattr(run, name, None) for name in _COLUMNS}
        row |= {"loss": losses.get(metric), "seconds": None if run is None else run.seconds, "problem": outcome.problem}
        rows.append(row)
    return rows


def write_sweep(path: Path, outcomes: Sequence[Outcome], metric: str = "bits_per_byte") -> None:
    """A CSV of the rows, which `bessemer scaling fit` reads."""
    rows = sweep_rows(outcomes, metric)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if value is None else value for key, value in row.items()} for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, stream.getvalue())
