"""Runs a recipe's stages: reuses what is finished, resumes what was interrupted, makes the rest, and links the run's folder.

A stage is made under its key's lock and published whole (`bessemer.core.store`): a run may be killed at any moment, and two
runs on one store wait for each other instead of doing the work twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from bessemer.core.config import Config
from bessemer.core.errors import ArtefactError, ConfigError, StaleMeasurementError
from bessemer.core.progress import Progress
from bessemer.pipeline.keys import key_of
from bessemer.pipeline.launch import Ranks
from bessemer.pipeline.recipe import Recipe, Stage
from bessemer.pipeline.run_folder import RunFolder, StageResult
from bessemer.pipeline.stage_maker import ResolvedStage, StageMaker, input_paths
from bessemer.pipeline.stage_planner import StagePlanner

_MAKING = "making the same thing"


class Runner(StagePlanner):
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
        super().__init__(recipe, run, progress=progress, ranks=ranks)
        self._maker = StageMaker(self)
        self._launch = launch if self.ranks.alone else None

    def run(self, until: str | None = None, only: str | None = None) -> list[StageResult]:
        """Make or reuse every stage up to `until`, or `only` one whose inputs are finished; link the run's folder.

        Raises BessemerError for whatever the user can mend; what was finished stays.
        """
        made: dict[str, StageResult] = {}
        chosen = self.chosen(until or only)
        if self.ranks.leads:
            # the note of a run that was killed
            self._maker.note.end()
        for position, stage in enumerate(chosen):
            made[stage.name] = self._make(stage, made, reuse_only=only is not None and stage.name != only)
            self._check_use(made[stage.name], chosen[position + 1 :])
        return list(made.values())

    def _check_use(self, made: StageResult, later: list[Stage]) -> None:
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

    def _make(self, stage: Stage, made: dict[str, StageResult], *, reuse_only: bool) -> StageResult:
        """Make or reuse a stage; measure the machine first where its settings leave that open."""
        input_keys = {role: made[source.stage].artefact.key for role, source in stage.inputs.items()}
        inputs = input_paths(stage, made)
        given = self.identity(stage, stage.config, input_keys)

        def resolved_stage(config: Config) -> ResolvedStage:
            whole = given if config is stage.config else self.identity(stage, config, input_keys)
            return ResolvedStage(stage, config, whole, inputs)

        settings, measured = self.resolved_before(stage, given), None
        if settings is None and stage.spec.trains and not reuse_only:
            # measured by the processes that train, in their layout
            if self._launch is not None:
                self._launch(stage.name)
                settings = self.resolved_before(stage, given)
                assert settings is not None, "the processes ended well and measured nothing"
                return self._launched(stage, resolved_stage(settings).key)
            if not self.ranks.alone:
                with self.ranks.joined(self.device, stage.config.parallel):  # type: ignore[attr-defined]
                    from bessemer.distributed.mesh import agree

                    settings, _ = self._maker.measure(stage, given, inputs, agree=agree)
                    return self._make_resolved(resolved_stage(settings), None, reuse_only=False)
        began = time.monotonic()
        if settings is None:
            settings, measured = self._measured(stage, given, inputs, reuse_only=reuse_only)
        try:
            return self._make_resolved(resolved_stage(settings), measured, reuse_only=reuse_only)
        except StaleMeasurementError as stale:
            self.progress.say(f"{stage.name}: {stale}; measured again")
        settings, _ = self._measured(stage, given, inputs, spent=time.monotonic() - began)
        return self._make_resolved(resolved_stage(settings), None, reuse_only=reuse_only)

    def _measured(
        self,
        stage: Stage,
        given: dict[str, Any],
        inputs: dict[str, Path],
        *,
        reuse_only: bool = False,
        spent: float | None = None,
    ) -> tuple[Config, dict[str, Any] | None]:
        """As `StageMaker.measure`, on rank 0; the others wait for its outcome."""
        if not self.ranks.leads:
            name = f"resolved-{key_of(given)}"
            return self._maker.wait_for(lambda: self.resolved_before(stage, given), stage.name, name), None
        if reuse_only:
            raise _not_finished(stage)
        return self._maker.measure(stage, given, inputs, spent=spent)

    def _make_resolved(self, resolved: ResolvedStage, measured: dict[str, Any] | None, *, reuse_only: bool) -> StageResult:
        """Make or reuse a stage. measured: the figures behind its settings, where they were measured a moment ago."""
        stage, key = resolved.stage, resolved.key
        finished = self._take(stage, key)
        if finished is not None:
            self.progress.say(f"{stage.name}: reused")
            return finished
        if reuse_only:
            raise _not_finished(stage)
        if stage.spec.trains and not self.ranks.alone:
            return self._make_together(resolved)
        if not self.ranks.leads:
            return StageResult(stage, self._maker.wait_for(lambda: self.store.find(key), stage.name, key), reused=True)
        if stage.spec.trains and self._launch is not None:
            self._launch(stage.name)
            return self._launched(stage, key)
        with self._maker.locked(stage, key, _MAKING):
            others = self.store.find(key)
            if others is not None:
                self.progress.say(f"{stage.name}: reused, the other run made it")
                return self._linked(StageResult(stage, others, reused=True))
            return self._linked(StageResult(stage, self._maker.produce(resolved, measured), reused=False))

    def _make_together(self, resolved: ResolvedStage) -> StageResult:
        """All ranks train: rank 0 locks, prepares the folder and publishes, the others work in the same folder."""
        stage, key = resolved.stage, resolved.key
        if getattr(resolved.config, "deterministic", False):
            from bessemer.training.runtime import fix_cublas_workspaces

            # before the processes join, which initialises CUDA
            fix_cublas_workspaces()
        parallel = resolved.config.parallel  # type: ignore[attr-defined]
        with self._maker.locked(stage, key, _MAKING), self.ranks.joined(self.device, parallel):
            from bessemer.distributed.mesh import agree

            finished = agree(self.store.find(key))
            if self.ranks.leads:
                if finished is not None:
                    return self._linked(StageResult(stage, finished, reused=True))
                artefact = self._maker.produce(resolved, on_folder=lambda: agree(None))
                result = self._linked(StageResult(stage, artefact, reused=False))
                agree(None)
                return result
            if finished is None:
                # wait until rank 0 has made the folder
                agree(None)
                self._maker.work(resolved)
                # rank 0 has published the artefact
                agree(None)
        artefact = self._maker.wait_for(lambda: self.store.find(key), stage.name, key)
        return StageResult(stage, artefact, reused=finished is not None)

    def _launched(self, stage: Stage, key: str) -> StageResult:
        """What the processes that were started for a stage have made."""
        launched = self._take(stage, key)
        assert launched is not None, f"the processes ended well and made no {key}"
        return replace(launched, reused=False)

    def _take(self, stage: Stage, key: str) -> StageResult | None:
        """The finished artefact of this key, linked; None where there is none."""
        if self.store.find(key) is None:
            return None
        with self.store.lock(key) if self.ranks.leads else nullcontext():
            # `bessemer clean` may have removed it before the lock was taken
            artefact = self.store.find(key)
            return None if artefact is None else self._linked(StageResult(stage, artefact, reused=True))

    def _linked(self, result: StageResult) -> StageResult:
        """Link the run's folder to an artefact, under its key's lock: `bessemer clean` never sees it without a link."""
        if self.ranks.leads:
            self.run_folder.link_stage(result)
            self._maker.note.end(result.stage.name)
        return result


def _not_finished(stage: Stage) -> ArtefactError:
    return ArtefactError(f"{stage.name} is not finished yet; run without --only, or with --until {stage.name} first")
