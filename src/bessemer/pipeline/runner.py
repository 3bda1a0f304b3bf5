"""Runs a recipe's stages: reuses what is finished, goes on with what was interrupted, makes the rest.

Each stage is made under its key's lock, in `KEY.partial`, and published whole (`bessemer.core.store`), so that a
run may be killed at any moment, and two runs on one store wait for each other instead of doing the work twice.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from bessemer.core.config import Config
from bessemer.core.environment import git_commit, host, package_versions, peak_memory_bytes, reset_peak_memory
from bessemer.core.errors import ArtefactError, BessemerError, ConfigError, StaleMeasurementError, as_storage_error
from bessemer.core.metrics import duration
from bessemer.core.progress import Progress, Silent
from bessemer.core.stage import Outside, StageContext
from bessemer.core.store import Artefact, Stopwatch, Store
from bessemer.pipeline.checks import check_stage, memory_advice
from bessemer.pipeline.keys import LockFile, Resolved, difference, identity, key_of
from bessemer.pipeline.launch import Ranks, processes_here
from bessemer.pipeline.recipe import Recipe, Stage, feeding
from bessemer.pipeline.run_folder import Made, RunFolder, WorkingNote
from bessemer.pipeline.stages import SERVICES

#: Seconds to wait for an unresponsive rank 0: one that holds no lock and has published nothing.
_PATIENCE = 600.0

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Planned:
    """What would happen to a stage, and why."""

    stage: Stage
    action: Literal["reuse", "run", "resume"]
    why: str
    key: str | None


class Runner:
    """Runs one recipe into one run's folder."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunFolder,
        *,
        progress: Progress | None = None,
        ranks: Ranks | None = None,
        launch: Callable[[str], None] | None = None,
    ) -> None:
        """launch: starts the processes that make a stage which trains, by its name; None: it is made in this one."""
        self.recipe = recipe
        self.run_folder = run
        self.store = Store(run.store_root)
        self.lock_file = LockFile(run.folder / "recipe.lock.yaml", run.store_root)
        self.progress = progress or Silent()
        self._note = WorkingNote(run)
        self._ranks = ranks or Ranks()
        self._device = self._ranks.device(recipe.head.device)
        self._launch = launch if self._ranks.alone else None
        launched = processes_here(recipe.head.launch) * recipe.head.launch.nodes
        self._processes = launched if self._ranks.alone else self._ranks.world_size

    def check(self, *, until: str | None = None, only: str | None = None) -> None:
        """Look at what the stages read from outside and need of this machine, so that a missing file or library is named before
        hours of work above it.

        Raises BessemerError for the first that is missing, and when there is no stage of the name to stop at.
        """
        chosen = [self.recipe.stage(only)] if only is not None else self._chosen(until)
        lacking = {stage.name: problem for stage in chosen if (problem := self._lacks(stage)) is not None}
        if lacking:
            finished = self._finished(until or only)
            for name, problem in lacking.items():
                if name not in finished:
                    raise problem
        for stage in self.recipe.stages:
            above = {one.name: one.config for one in feeding(self.recipe.stages, stage)}
            conflict = stage.spec.conflict_of_files(stage.config, above, self.recipe.folder)
            if conflict is not None:
                raise ConfigError(f"{stage.name}: {conflict}")
            stage.spec.fingerprint(stage.config, self._outside(fetch=False))

    def _lacks(self, stage: Stage) -> BessemerError | None:
        """What a stage needs to be made and this machine or its settings do not give; None when all is there."""
        try:
            check_stage(self.recipe, stage, self._device, self._processes)
        except BessemerError as problem:
            return problem
        return None

    def _finished(self, until: str | None) -> set[str]:
        """Stages that are not made again, and so need nothing of this machine."""
        try:
            return {planned.stage.name for planned in self.plan(until) if planned.action == "reuse"}
        except ImportError:
            return set()

    def plan(self, until: str | None = None) -> list[Planned]:
        """What `run` would do with each stage. Nothing is written."""
        planned: list[Planned] = []
        keys: dict[str, str] = {}
        for stage in self._chosen(until):
            missing = [source.stage for source in stage.inputs.values() if source.stage not in keys]
            if missing:
                planned.append(Planned(stage, "run", f"needs {missing[0]}, which waits for a measurement", None))
                continue
            input_keys = {role: keys[source.stage] for role, source in stage.inputs.items()}
            given = self._identity(stage, stage.config, input_keys, fetch=False)
            resolved = self._resolved_before(stage, given)
            if resolved is None:
                planned.append(Planned(stage, "run", "its size is measured on this machine when it starts", None))
                continue
            whole = given if resolved is stage.config else self._identity(stage, resolved, input_keys, fetch=False)
            key = keys[stage.name] = key_of(whole)
            if self.store.find(key):
                planned.append(Planned(stage, "reuse", "finished earlier, nothing that it depends on has changed", key))
            elif stage.spec.resumes and self.store.partial(key).exists():
                planned.append(Planned(stage, "resume", "was interrupted, goes on from its last checkpoint", key))
            else:
                before = self.run_folder.manifest(stage.name)
                planned.append(Planned(stage, "run", difference(before, whole) if before else "not made yet", key))
        return planned

    def run(self, until: str | None = None, only: str | None = None) -> list[Made]:
        """Make or reuse every stage up to `until`, or `only` one whose inputs are finished; link the run's folder.

        Raises BessemerError for whatever the user can mend; what was finished stays.
        """
        made: dict[str, Made] = {}
        chosen = self._chosen(until or only)
        if self._ranks.leads:
            # what an earlier one left
            self._note.end()
        for position, stage in enumerate(chosen):
            made[stage.name] = self._make(stage, made, reuse_only=only is not None and stage.name != only)
            self._check_use(made[stage.name], chosen[position + 1 :])
        return list(made.values())

    def _check_use(self, made: Made, later: list[Stage]) -> None:
        """Raise ConfigError when a later stage can do nothing with what was made, before the stages between are made for it."""
        for stage in later:
            inputs = {
                role: made.artefact.folder / made.stage.spec.makes[source.kind]
                for role, source in stage.inputs.items()
                if source.stage == made.stage.name
            }
            problem = stage.spec.unusable(stage.config, inputs, self.run_folder.cache) if inputs else None
            if problem is not None:
                raise ConfigError(f"{stage.name}: {problem}")

    def _chosen(self, until: str | None) -> list[Stage]:
        stages = list(self.recipe.stages)
        return stages[: stages.index(self.recipe.stage(until)) + 1] if until else stages

    def _outside(self, *, fetch: bool) -> Outside:
        return Outside(self.recipe.folder, self.run_folder.cache, fetch, self.progress)

    def _identity(self, stage: Stage, config: Config, input_keys: dict[str, str], *, fetch: bool = True) -> dict[str, Any]:
        return identity(self.recipe, stage, config, input_keys, self._outside(fetch=fetch))

    def _resolved_before(self, stage: Stage, given: dict[str, Any]) -> Config | None:
        """The stage's settings without `auto` or `minutes`, if there are none or they were measured before."""
        if stage.spec.resolve is None or stage.config.resolved:  # type: ignore[attr-defined]
            return stage.config
        found = self.lock_file.find(stage.name, key_of(given))
        if found is None:
            return None
        if self._ranks.leads:
            self.lock_file.keep(stage.name, key_of(given), found)
        # what cannot change the result is as asked now, not as it was when the machine was measured
        settings = found.settings | stage.config.incidental_settings()
        return stage.spec.config.parse(settings, f"{self.run_folder.folder / 'recipe.lock.yaml'}: {stage.name}")

    def _context(
        self, stage: Stage, config: Config, made: dict[str, Made], out: Path, measured: dict[str, Any] | None = None
    ) -> StageContext:
        inputs = {
            role: made[source.stage].artefact.folder / made[source.stage].stage.spec.makes[source.kind]
            for role, source in stage.inputs.items()
        }
        return StageContext(
            config=config,
            inputs=inputs,
            out=out,
            folder=self.recipe.folder,
            cache=self.run_folder.cache,
            seed=self.recipe.head.seed,
            device=self._device,
            progress=self.progress if self._ranks.leads else Silent(),
            measured=measured,
            services=SERVICES,
        )

    def _make(self, stage: Stage, made: dict[str, Made], *, reuse_only: bool) -> Made:
        input_keys = {role: made[source.stage].artefact.key for role, source in stage.inputs.items()}
        given = self._identity(stage, stage.config, input_keys)
        resolved, measured = self._resolved_before(stage, given), None
        if resolved is None and stage.spec.trains and not reuse_only:
            # measured by the processes that train, in their layout
            if self._launch is not None:
                self._launch(stage.name)
                resolved = self._resolved_before(stage, given)
                assert resolved is not None, "the processes ended well and measured nothing"
                return self._launched(stage, key_of(self._identity(stage, resolved, input_keys)))
            if not self._ranks.alone:
                with self._ranks.joined(self._device, stage.config.parallel):  # type: ignore[attr-defined]
                    resolved = self._resolve_together(stage, given, made)
                    return self._make_resolved(stage, resolved, None, given, made, reuse_only=False)
        began = time.monotonic()
        if resolved is None:
            resolved, measured = self._resolve(stage, given, made, may_measure=not reuse_only)
        try:
            return self._make_resolved(stage, resolved, measured, given, made, reuse_only=reuse_only)
        except StaleMeasurementError as stale:
            self.progress.say(f"{stage.name}: {stale}; measured again")
        resolved, _ = self._resolve(stage, given, made, may_measure=True, spent=time.monotonic() - began)
        return self._make_resolved(stage, resolved, None, given, made, reuse_only=reuse_only)

    def _make_resolved(
        self,
        stage: Stage,
        resolved: Config,
        measured: dict[str, Any] | None,
        given: dict[str, Any],
        made: dict[str, Made],
        *,
        reuse_only: bool,
    ) -> Made:
        """Make or reuse a stage whose settings leave nothing open. measured: a moment ago, for these settings."""
        input_keys = {role: made[source.stage].artefact.key for role, source in stage.inputs.items()}
        whole = given if resolved is stage.config else self._identity(stage, resolved, input_keys)
        key = key_of(whole)
        found = self._take(stage, key)
        if found is not None:
            self.progress.say(f"{stage.name}: reused")
            return found
        if reuse_only:
            raise ArtefactError(f"{stage.name} is not finished yet; run without --only, or with --until {stage.name} first")
        if stage.spec.trains and not self._ranks.alone:
            return self._make_together(stage, resolved, whole, key, made)
        if not self._ranks.leads:
            return Made(stage, self._wait_for(lambda: self.store.find(key), stage.name, key), reused=True)
        if stage.spec.trains and self._launch is not None:
            self._launch(stage.name)
            return self._launched(stage, key)

        def say_waiting() -> None:
            self.progress.say(f"{stage.name}: another run is making the same thing; waiting for it")

        with self.store.lock(key, say_waiting):
            others = self.store.find(key)
            if others is not None:
                self.progress.say(f"{stage.name}: reused, the other run made it")
                return self._linked(Made(stage, others, reused=True))
            artefact = self._produce(stage, resolved, whole, key, made, measured=measured)
            return self._linked(Made(stage, artefact, reused=False))

    def _launched(self, stage: Stage, key: str) -> Made:
        """What the processes that were started for a stage have made."""
        launched = self._take(stage, key)
        assert launched is not None, f"the processes ended well and made no {key}"
        return replace(launched, reused=False)

    def _take(self, stage: Stage, key: str) -> Made | None:
        """The finished artefact of this key; None where there is none."""
        if self.store.find(key) is None:
            return None
        with self.store.lock(key) if self._ranks.leads else nullcontext():
            # as it is under the lock
            found = self.store.find(key)
            return None if found is None else self._linked(Made(stage, found, reused=True))

    def _linked(self, made: Made) -> Made:
        """Lead the run's folder to an artefact. Under its key's lock, so that `bessemer clean` never sees it without a link."""
        if self._ranks.leads:
            self.run_folder.link_stage(made)
            self._note.end(made.stage.name)
        return made

    def _make_together(self, stage: Stage, config: Config, whole: dict[str, Any], key: str, made: dict[str, Made]) -> Made:
        """All ranks train: rank 0 locks, prepares the folder and publishes, the others work in the same folder."""

        def say_waiting() -> None:
            self.progress.say(f"{stage.name}: another run is making the same thing; waiting for it")

        if getattr(config, "deterministic", False):
            from bessemer.training.runtime import fix_cublas_workspaces

            # before the processes join, which initialises CUDA
            fix_cublas_workspaces()
        lock = self.store.lock(key, say_waiting) if self._ranks.leads else nullcontext()
        with lock, self._ranks.joined(self._device, config.parallel):  # type: ignore[attr-defined]
            from bessemer.distributed.mesh import agree

            found = agree(self.store.find(key) is not None)
            if not found and self._ranks.leads:
                produced = self._linked(Made(stage, self._produce(stage, config, whole, key, made, start=agree), reused=False))
                agree(None)
                return produced
            if self._ranks.leads:
                found_here = self.store.find(key)
                assert found_here is not None
                return self._linked(Made(stage, found_here, reused=True))
            if not found:
                # the folder is there
                agree(None)
                _run(stage, self._context(stage, config, made, self.store.partial(key)))
                # and here the artefact
                agree(None)
        artefact = self._wait_for(lambda: self.store.find(key), stage.name, key)
        return Made(stage, artefact, reused=found)

    def _resolve(
        self, stage: Stage, given: dict[str, Any], made: dict[str, Made], *, may_measure: bool, spent: float | None = None
    ) -> tuple[Config, dict[str, Any] | None]:
        """Measure the machine for a stage that says `minutes` or `auto`, and keep the outcome.

        Returns the settings, and what was measured for them; None where that was earlier. spent: seconds of the stage's
        minutes that are gone, since the run has contradicted the measurement: measure again.
        """
        name = f"resolved-{key_of(given)}"
        if not self._ranks.leads:
            return self._wait_for(lambda: self._resolved_before(stage, given), stage.name, name), None
        if not may_measure:
            raise ArtefactError(f"{stage.name} is not finished yet; run without --only, or with --until {stage.name} first")
        with self.store.lock(name, lambda: self.progress.say(f"{stage.name}: another run is measuring; waiting for it")):
            resolved = None if spent is not None else self._resolved_before(stage, given)
            if resolved is not None:
                return resolved, None
            scratch = self.store.root / f"{name}.partial"
            with self._noted(stage, name):
                resolved, measured = _resolved(stage, self._context(stage, _less(stage.config, spent), made, scratch))
            outcome = Resolved(resolved.model_dump(mode="json"), measured)
            self.lock_file.keep(stage.name, key_of(given), outcome, replace=spent is not None)
        return resolved, measured

    def _resolve_together(self, stage: Stage, given: dict[str, Any], made: dict[str, Made]) -> Config:
        """All ranks of a job measure for a stage that they train; rank 0 locks and keeps the outcome."""
        from bessemer.distributed.mesh import agree

        name = f"resolved-{key_of(given)}"

        def say_waiting() -> None:
            self.progress.say(f"{stage.name}: another run is measuring; waiting for it")

        with self.store.lock(name, say_waiting) if self._ranks.leads else nullcontext():
            found: Config | None = agree(self._resolved_before(stage, given) if self._ranks.leads else None)
            if found is not None:
                return found
            scratch = self.store.root / f"{name}.partial"
            with self._noted(stage, name) if self._ranks.leads else nullcontext():
                resolved, measured = _resolved(stage, self._context(stage, stage.config, made, scratch))
            if self._ranks.leads:
                self.lock_file.keep(stage.name, key_of(given), Resolved(resolved.model_dump(mode="json"), measured))
        return resolved

    @contextmanager
    def _noted(self, stage: Stage, name: str) -> Iterator[None]:
        """While the machine is measured for a stage: who looks at the run sees it at work, and why it failed."""
        self._note.begin(stage.name, name, stage.config)
        try:
            yield
        except Exception as error:
            self._note.fail(str(error) or type(error).__name__)
            raise

    def _wait_for(self, look: Callable[[], _Found | None], stage: str, key: str) -> _Found:
        """What rank 0 publishes, once it has. Raises ArtefactError when rank 0 seems to be gone."""
        alive = time.monotonic()
        while (found := look()) is None:
            if self.store.is_locked(key):
                alive = time.monotonic()
            elif time.monotonic() - alive > _PATIENCE:
                raise ArtefactError(f"{stage}: rank 0 has neither finished it nor is at work on it; look at its log")
            time.sleep(0.5)
        return found

    def _produce(
        self,
        stage: Stage,
        config: Config,
        whole: dict[str, Any],
        key: str,
        made: dict[str, Made],
        start: Callable[[None], None] = lambda ready: None,
        measured: dict[str, Any] | None = None,
    ) -> Artefact:
        partial = self.store.partial(key)
        resumed = partial.exists() and stage.spec.resumes
        if partial.exists() and not resumed:
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
        self.progress.say(f"{stage.name}: {'goes on where it was interrupted' if resumed else 'starts'}")
        start(None)
        self._note.begin(stage.name, key, config)
        reset_peak_memory()
        stopwatch = Stopwatch(partial)
        try:
            metrics = _run(stage, self._context(stage, config, made, partial, None if resumed else measured))
            manifest = {
                **whole,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(stopwatch.seconds, 3),
                "peak_memory_bytes": peak_memory_bytes(),
                "host": host(),
                "versions": package_versions(),
                "commit": git_commit(),
                "metrics": metrics,
            }
            artefact = self.store.publish(key, manifest)
        except StaleMeasurementError:
            # its checkpoints are of a run of another length
            shutil.rmtree(partial)
            raise
        except BaseException as error:
            if isinstance(error, Exception):
                self._note.fail(str(error) or type(error).__name__)
            self._leave(stage, partial, stopwatch)
            full = None if isinstance(error, BessemerError) else as_storage_error(error, partial)
            if full is not None:
                raise full from error
            raise
        self._note.end()
        self.progress.say(f"{stage.name}: done in {duration(stopwatch.seconds)}")
        return artefact

    def _leave(self, stage: Stage, partial: Path, stopwatch: Stopwatch) -> None:
        """After a failure: keep what the next run can go on from, and nothing else."""
        # part of the artefact, or scratch
        kept = [*partial.glob("checkpoints/*"), *partial.glob(".checkpoints/*")]
        if stage.spec.resumes and kept:
            try:
                stopwatch.save()
            except OSError:  # a full disk: only a figure is lost
                pass
        else:
            shutil.rmtree(partial, ignore_errors=True)


def _less(config: Config, spent: float | None) -> Config:
    """Settings whose `minutes` are less by some seconds, by three quarters at most."""
    minutes = getattr(config, "minutes", None)
    if minutes is None or spent is None or spent < 1:
        return config
    return config.with_changes(minutes=max(minutes - spent / 60, minutes / 4))


def _run(stage: Stage, context: StageContext) -> dict[str, Any]:
    """Do a stage's work; the headline metrics of its manifest."""
    with memory_advice(context) if stage.spec.trains else nullcontext():
        return stage.spec.run(context)


def _resolved(stage: Stage, context: StageContext) -> tuple[Config, dict[str, Any]]:
    """Measure the machine for a stage: its settings, and the figures that decided them."""
    assert stage.spec.resolve is not None
    with memory_advice(context) if stage.spec.trains else nullcontext():
        return stage.spec.resolve(context)
