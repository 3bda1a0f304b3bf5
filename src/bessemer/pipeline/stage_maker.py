"""Makes a stage in `KEY.partial` and publishes it whole; measures the machine for settings such as `minutes` and `auto`."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from bessemer.core.config import Config
from bessemer.core.environment import git_commit, host, package_versions, peak_memory_bytes, reset_peak_memory
from bessemer.core.errors import ArtefactError, BessemerError, StaleMeasurementError, as_storage_error
from bessemer.core.metrics import duration
from bessemer.core.progress import Silent
from bessemer.core.stage import StageContext
from bessemer.core.store import Artefact, Stopwatch
from bessemer.pipeline.checks import memory_advice
from bessemer.pipeline.keys import Resolved, key_of
from bessemer.pipeline.recipe import Stage
from bessemer.pipeline.run_folder import StageResult, WorkingNote
from bessemer.pipeline.stage_planner import StagePlanner
from bessemer.pipeline.stages import SERVICES

#: Seconds to wait for an unresponsive rank 0: one that holds no lock and has published nothing.
_PATIENCE = 600.0

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class ResolvedStage:
    """A stage with settings that leave nothing to measure. inputs: role → path of the artefact that feeds it."""

    stage: Stage
    config: Config
    identity: dict[str, Any]
    inputs: dict[str, Path]

    @cached_property
    def key(self) -> str:
        """Name of its folder in the store."""
        return key_of(self.identity)


def input_paths(stage: Stage, made: dict[str, StageResult]) -> dict[str, Path]:
    """Role → path of the artefact that feeds it. made: the stages so far, by name."""
    sources = {role: (made[source.stage], source.kind) for role, source in stage.inputs.items()}
    return {role: result.artefact.folder / result.stage.spec.makes[kind] for role, (result, kind) in sources.items()}


class StageMaker:
    """Makes the stages of a plan, alone or as one of several ranks."""

    def __init__(self, planner: StagePlanner) -> None:
        self._planner = planner
        self._store = planner.store
        self._progress = planner.progress
        self._leads = planner.ranks.leads
        self.note = WorkingNote(planner.run_folder)

    def locked(self, stage: Stage, key: str, activity: str) -> AbstractContextManager[None]:
        """The lock of a key, which rank 0 alone holds. activity: what another run that holds it is said to do."""

        def say_waiting() -> None:
            self._progress.say(f"{stage.name}: another run is {activity}; waiting for it")

        return self._store.lock(key, say_waiting) if self._leads else nullcontext()

    def wait_for(self, look: Callable[[], _Value | None], stage: str, key: str) -> _Value:
        """What rank 0 publishes, once it has. Raises ArtefactError when rank 0 seems to be gone."""
        alive = time.monotonic()
        while (published := look()) is None:
            if self._store.is_locked(key):
                alive = time.monotonic()
            elif time.monotonic() - alive > _PATIENCE:
                raise ArtefactError(f"{stage}: rank 0 has neither finished it nor is at work on it; look at its log")
            time.sleep(0.5)
        return published

    def measure(
        self,
        stage: Stage,
        given: dict[str, Any],
        inputs: dict[str, Path],
        *,
        spent: float | None = None,
        agree: Callable[[Any], Any] = lambda value: value,
    ) -> tuple[Config, dict[str, Any] | None]:
        """Measure the machine for a stage that says `minutes` or `auto`, and keep the outcome.

        Returns the settings, and the figures that decided them; None where these were measured earlier. given: the identity of
        the settings as the recipe has them. spent: seconds of the stage's minutes that are gone because the run contradicted
        the last measurement. agree: rank 0's value on every rank, where several measure together.
        """
        name = f"resolved-{key_of(given)}"
        with self.locked(stage, name, "measuring"):
            kept = self._planner.resolved_before(stage, given) if self._leads and spent is None else None
            settings: Config | None = agree(kept)
            if settings is not None:
                return settings, None
            context = self._context(_less(stage.config, spent), inputs, self._store.root / f"{name}.partial")
            with self._noted(stage, name) if self._leads else nullcontext(), _advice(stage, context):
                assert stage.spec.resolve is not None
                settings, measured = stage.spec.resolve(context)
            if self._leads:
                outcome = Resolved(settings.model_dump(mode="json"), measured)
                self._planner.lock_file.keep(stage.name, key_of(given), outcome, replace=spent is not None)
        return settings, measured

    @contextmanager
    def _noted(self, stage: Stage, name: str) -> Iterator[None]:
        """Show the run's stage at work while the machine is measured for it, and why that failed."""
        self.note.begin(stage.name, name, stage.config)
        try:
            yield
        except Exception as error:
            self.note.fail(str(error) or type(error).__name__)
            raise

    def produce(
        self,
        resolved: ResolvedStage,
        measured: dict[str, Any] | None = None,
        on_folder: Callable[[], object] = lambda: None,
    ) -> Artefact:
        """Make a stage and publish it. The caller holds the lock of its key.

        measured: the figures behind the settings, where they were measured a moment ago. on_folder: called when the folder is
        there, which other ranks work in.
        """
        stage, partial = resolved.stage, self._store.partial(resolved.key)
        resumed = partial.exists() and stage.spec.resumes
        if partial.exists() and not resumed:
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
        self._progress.say(f"{stage.name}: {'goes on where it was interrupted' if resumed else 'starts'}")
        on_folder()
        self.note.begin(stage.name, resolved.key, resolved.config)
        reset_peak_memory()
        stopwatch = Stopwatch(partial)
        try:
            metrics = self.work(resolved, None if resumed else measured)
            manifest = {
                **resolved.identity,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(stopwatch.seconds, 3),
                "peak_memory_bytes": peak_memory_bytes(),
                "host": host(),
                "versions": package_versions(),
                "commit": git_commit(),
                "metrics": metrics,
            }
            artefact = self._store.publish(resolved.key, manifest)
        except StaleMeasurementError:
            # the checkpoints belong to a run of another length
            shutil.rmtree(partial)
            raise
        except BaseException as error:
            if isinstance(error, Exception):
                self.note.fail(str(error) or type(error).__name__)
            _keep_checkpoints(stage, partial, stopwatch)
            full = None if isinstance(error, BessemerError) else as_storage_error(error, partial)
            if full is not None:
                raise full from error
            raise
        self.note.end()
        self._progress.say(f"{stage.name}: done in {duration(stopwatch.seconds)}")
        return artefact

    def work(self, resolved: ResolvedStage, measured: dict[str, Any] | None = None) -> dict[str, Any]:
        """Do this rank's part of a stage in `KEY.partial`; returns the headline metrics of the manifest."""
        context = self._context(resolved.config, resolved.inputs, self._store.partial(resolved.key), measured)
        with _advice(resolved.stage, context):
            return resolved.stage.spec.run(context)

    def _context(
        self, config: Config, inputs: dict[str, Path], out: Path, measured: dict[str, Any] | None = None
    ) -> StageContext:
        planner = self._planner
        return StageContext(
            config=config,
            inputs=inputs,
            out=out,
            folder=planner.recipe.folder,
            cache=planner.run_folder.cache,
            seed=planner.recipe.head.seed,
            device=planner.device,
            progress=self._progress if self._leads else Silent(),
            measured=measured,
            services=SERVICES,
        )


def _advice(stage: Stage, context: StageContext) -> AbstractContextManager[None]:
    """While a stage that trains is at work, a failed allocation says which settings would fit."""
    return memory_advice(context) if stage.spec.trains else nullcontext()


def _keep_checkpoints(stage: Stage, partial: Path, stopwatch: Stopwatch) -> None:
    """After a failure: keep the folder where its checkpoints let the next run resume, else remove it."""
    # checkpoints are part of the artefact, or scratch
    kept = [*partial.glob("checkpoints/*"), *partial.glob(".checkpoints/*")]
    if not (stage.spec.resumes and kept):
        shutil.rmtree(partial, ignore_errors=True)
        return
    try:
        stopwatch.save()
    except OSError:  # a full disk: only a figure is lost
        pass


def _less(config: Config, spent: float | None) -> Config:
    """Settings whose `minutes` are less by some seconds, by three quarters at most."""
    minutes = getattr(config, "minutes", None)
    if minutes is None or spent is None or spent < 1:
        return config
    return config.with_changes(minutes=max(minutes - spent / 60, minutes / 4))
