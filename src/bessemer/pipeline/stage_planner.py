"""Plans a recipe's stages: the key of each, whether it is reused, resumed or made, and what this machine lacks for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from bessemer.core.config import Config
from bessemer.core.errors import BessemerError, ConfigError
from bessemer.core.progress import Progress, Silent
from bessemer.core.stage import Outside
from bessemer.core.store import Store
from bessemer.pipeline.checks import check_stage
from bessemer.pipeline.keys import LockFile, difference, identity, key_of
from bessemer.pipeline.launch import Ranks, processes_here
from bessemer.pipeline.recipe import Recipe, Stage, feeding
from bessemer.pipeline.run_folder import RunFolder


@dataclass(frozen=True)
class StagePlan:
    """What would happen to a stage, and why. key: None where the settings are still to be measured."""

    stage: Stage
    action: Literal["reuse", "run", "resume"]
    why: str
    key: str | None


class StagePlanner:
    """Plans one recipe's stages in one run's folder. Makes nothing."""

    def __init__(self, recipe: Recipe, run: RunFolder, *, progress: Progress | None = None, ranks: Ranks | None = None) -> None:
        self.recipe = recipe
        self.run_folder = run
        self.store = Store(run.store_root)
        self.lock_file = LockFile(run.folder / "recipe.lock.yaml", run.store_root)
        self.progress = progress or Silent()
        self.ranks = ranks or Ranks()
        self.device = self.ranks.device(recipe.head.device)
        launched = processes_here(recipe.head.launch) * recipe.head.launch.nodes
        self._processes = launched if self.ranks.alone else self.ranks.world_size

    def check(self, *, until: str | None = None, only: str | None = None) -> None:
        """Check what the stages read from outside and need of this machine, before hours of work above them.

        Raises BessemerError for the first that is missing, and when there is no stage of the name to stop at.
        """
        chosen = [self.recipe.stage(only)] if only is not None else self.chosen(until)
        lacking = {stage.name: problem for stage in chosen if (problem := self._lacks(stage)) is not None}
        if lacking:
            finished = self._finished(until or only)
            for name, problem in lacking.items():
                if name not in finished:
                    raise problem
        for stage in self.recipe.stages:
            above = {other.name: other.config for other in feeding(self.recipe.stages, stage)}
            conflict = stage.spec.conflict_of_files(stage.config, above, self.recipe.folder)
            if conflict is not None:
                raise ConfigError(f"{stage.name}: {conflict}")
            stage.spec.fingerprint(stage.config, self._outside(fetch=False))

    def _lacks(self, stage: Stage) -> BessemerError | None:
        """What a stage needs and this machine or its settings do not give; None when all is there."""
        try:
            check_stage(self.recipe, stage, self.device, self._processes)
        except BessemerError as problem:
            return problem
        return None

    def _finished(self, until: str | None) -> set[str]:
        """Stages that are not made again, and so need nothing of this machine."""
        try:
            return {planned.stage.name for planned in self.plan(until) if planned.action == "reuse"}
        except ImportError:
            return set()

    def plan(self, until: str | None = None) -> list[StagePlan]:
        """What `run` would do with each stage."""
        plans: list[StagePlan] = []
        keys: dict[str, str] = {}
        for stage in self.chosen(until):
            missing = [source.stage for source in stage.inputs.values() if source.stage not in keys]
            if missing:
                plans.append(StagePlan(stage, "run", f"needs {missing[0]}, which waits for a measurement", None))
                continue
            input_keys = {role: keys[source.stage] for role, source in stage.inputs.items()}
            given = self.identity(stage, stage.config, input_keys, fetch=False)
            resolved = self.resolved_before(stage, given)
            if resolved is None:
                plans.append(StagePlan(stage, "run", "its size is measured on this machine when it starts", None))
                continue
            whole = given if resolved is stage.config else self.identity(stage, resolved, input_keys, fetch=False)
            key = keys[stage.name] = key_of(whole)
            if self.store.find(key):
                plans.append(StagePlan(stage, "reuse", "finished earlier, nothing that it depends on has changed", key))
            elif stage.spec.resumes and self.store.partial(key).exists():
                plans.append(StagePlan(stage, "resume", "was interrupted, goes on from its last checkpoint", key))
            else:
                before = self.run_folder.manifest(stage.name)
                plans.append(StagePlan(stage, "run", difference(before, whole) if before else "not made yet", key))
        return plans

    def chosen(self, until: str | None) -> list[Stage]:
        """The stages up to `until`; all where it is None. Raises ConfigError when there is no stage of the name."""
        stages = list(self.recipe.stages)
        return stages[: stages.index(self.recipe.stage(until)) + 1] if until else stages

    def _outside(self, *, fetch: bool) -> Outside:
        return Outside(self.recipe.folder, self.run_folder.cache, fetch, self.progress)

    def identity(self, stage: Stage, config: Config, input_keys: dict[str, str], *, fetch: bool = True) -> dict[str, Any]:
        """What a stage's output depends on (`keys.identity`). fetch: whether its sources may be downloaded for that."""
        return identity(self.recipe, stage, config, input_keys, self._outside(fetch=fetch))

    def resolved_before(self, stage: Stage, given: dict[str, Any]) -> Config | None:
        """The stage's settings without `auto` and `minutes`; None where these are still to be measured.

        given: the identity of the settings as the recipe has them.
        """
        if stage.spec.resolve is None or stage.config.resolved:  # type: ignore[attr-defined]
            return stage.config
        measured = self.lock_file.find(stage.name, key_of(given))
        if measured is None:
            return None
        if self.ranks.leads:
            self.lock_file.keep(stage.name, key_of(given), measured)
        # settings that cannot change the result are those of today's recipe
        settings = measured.settings | stage.config.incidental_settings()
        return stage.spec.config.parse(settings, f"{self.run_folder.folder / 'recipe.lock.yaml'}: {stage.name}")
