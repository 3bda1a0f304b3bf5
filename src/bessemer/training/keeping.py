"""Which of two models a stage ends with: the one that it trained, or the one that it started from, where that is better.

A stage that aligns a model can make it worse at what it was good at (the "alignment tax" of Ouyang et al. 2022, section 4.2),
and can overfit what it learns. Both models are asked the same items: those of tasks, and what the stage has held out. Of each
measure the differences are paired by item, so that an item's difficulty cancels (Miller 2024, arXiv 2411.00640, section 4.2).
The trained model is given up where it is worse by any measure, beyond the interval of the difference.

Both models are read from their folders when training is finished, so that a run that is stopped in between compares them when
it is resumed, with the same result. What was trained is not lost: it lies in `model-trained/`, an adapter in
`adapter-trained/`.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bessemer.core.errors import ConfigError
from bessemer.core.progress import Progress
from bessemer.core.stage import ItemScore, OpenTasks, TaskScorer
from bessemer.core.statistics import Estimate, paired_difference
from bessemer.core.store import new_folder, write_json
from bessemer.distributed.mesh import Mesh
from bessemer.model.adapters.folder import read_adapter, write_adapter
from bessemer.model.adapters.trained import adapter_of, is_trained_by_adapter, merged
from bessemer.model.decoder import Decoder
from bessemer.model.storage.folder import load_model
from bessemer.model.storage.model_config import read_decoder_config
from bessemer.model.vision.trained import load_trained_decoder, save_trained_decoder
from bessemer.training.config import LoopConfig
from bessemer.training.config_parts import KeepBetterConfig
from bessemer.training.data.batch import Batch
from bessemer.training.model_roles import POLICY, ModelRoles
from bessemer.training.model_setup import PreparedModel
from bessemer.training.monitoring.run_metrics import opened_tasks
from bessemer.training.objectives import LossContext, Objective, build_objective
from bessemer.training.report import COMPARISON, KEPT, KEPT_BEFORE, KEPT_TRAINED, comparison_sentence
from bessemer.training.runtime import Runtime
from bessemer.training.starting_model import StartingModel

#: Ending of the folders of what was trained and is not kept.
TRAINED = "-trained"


class HeldOut(NamedTuple):
    """What a stage has held out. name: of the measure, with its unit. scores: of each item, of a policy in evaluation mode, NaN
    where it has none; the first `limit` items."""

    name: str
    scores: Callable[[ModelRoles, int], Sequence[float]]
    lower_is_better: bool = False


def losses_held_out(packed: Batch, config: LoopConfig, objective: Objective | None = None) -> HeldOut | None:
    """The objective's loss of each of a stage's held-out rows; None where there are none. objective: None: that of the next
    token, as the settings say."""
    if not packed.tokens_BT.shape[0]:
        return None

    def losses(models: ModelRoles, limit: int) -> list[float]:
        chosen = objective or build_objective(config, models.policy.model.config)
        return row_losses(models, chosen, packed.rows(slice(0, limit)))

    return HeldOut("held-out loss", losses, lower_is_better=True)


@torch.no_grad()
def row_losses(models: ModelRoles, objective: Objective, packed: Batch) -> list[float]:
    """The loss of each row by itself, in the objective's unit: the sum over its terms of their sum over their denominator.

    Where a row is one sequence of several that are judged together, these are one. NaN of a row without a target.
    """
    losses = []
    for start in range(0, packed.tokens_BT.shape[0], packed.rows_together):
        row = objective.annotate(models, packed.rows(slice(start, start + packed.rows_together)))
        counts = objective.denominators(row)
        with models.prepared(POLICY) as prepared:
            (terms,) = models.for_each_micro_batch(prepared, row, lambda model, batch: objective(model, batch, LossContext()))
        known = [float(total) / counts[name].value for name, total in terms.sums.items() if counts[name].value]
        losses.append(sum(known) if known else math.nan)
    return losses


class MeasuredItems(NamedTuple):
    """One measure of a model by item. is_share: scores are shares, shown in per cent."""

    items: Mapping[str, ItemScore]
    lower_is_better: bool = False
    is_share: bool = False


@dataclass(frozen=True)
class ComparedMeasure:
    """A measure of two models on the items that both have a score of: their means, and the paired difference, after − before,
    positive where the trained model is better."""

    name: str
    is_share: bool
    before: float
    after: float
    difference: Estimate

    def is_worse(self, confidence: float) -> bool:
        """Whether the trained model is worse: by more than chance explains, or with a confidence of 0 at all."""
        return self.difference.mean < 0 and self.difference.p_value <= 1 - confidence

    def record(self, confidence: float) -> dict[str, Any]:
        """As plain values; the interval is that of 95 %."""
        # of a single item there is no interval
        interval = [bound if math.isfinite(bound) else None for bound in self.difference.interval()]
        return {
            "name": self.name,
            "share": self.is_share,
            "before": self.before,
            "after": self.after,
            "difference": self.difference.mean,
            "interval": interval,
            "p_value": self.difference.p_value,
            "items": self.difference.items,
            "worse": self.is_worse(confidence),
        }


def compare_models(before: Mapping[str, MeasuredItems], after: Mapping[str, MeasuredItems]) -> list[ComparedMeasure]:
    """The measures of two models. Raises ConfigError for one of which they have no item in common."""
    found = []
    for name, measured in before.items():
        others = after[name].items
        shared = [item for item in measured.items if item in others]
        if not shared:
            raise ConfigError(f"keep_better: {name}: no item has a score of both models; leave this measure out")
        old, new = ([scores[item].score for item in shared] for scores in (measured.items, others))
        # an item without a cluster is its own: a tuple equals no name of a cluster
        clusters = [measured.items[item].cluster or (item,) for item in shared]
        better, worse = (old, new) if measured.lower_is_better else (new, old)
        difference = paired_difference(better, worse, clusters)
        means = sum(old) / len(old), sum(new) / len(new)
        found.append(ComparedMeasure(name, measured.is_share, *means, difference))
    return found


class Keeper:
    """Compares the models of a finished run, and leaves the better one in its folder."""

    def __init__(
        self,
        config: KeepBetterConfig,
        scorer: TaskScorer | None,
        start: StartingModel,
        runtime: Runtime,
        out: Path,
        progress: Progress,
    ) -> None:
        self._config = config
        self._scorer = scorer
        self._start = start
        self._runtime = runtime
        self._out = out
        self._progress = progress

    @classmethod
    def open(
        cls,
        config: LoopConfig,
        start: StartingModel,
        runtime: Runtime,
        mesh: Mesh,
        out: Path,
        progress: Progress,
        *,
        folder: Path,
        tasks: OpenTasks | None,
    ) -> Keeper | None:
        """The keeper of a run's settings; None where they ask for none.

        folder, tasks: as in `RunContext`. Raises ConfigError in several processes and for tasks that cannot be asked.
        """
        comparison = config.comparison
        if comparison is None:
            return None
        if not mesh.alone:
            raise ConfigError(
                f"keep_better: models are compared in one process, and {mesh.layout.world_size} train this one; leave it out, "
                "and compare with bessemer evaluate"
            )
        scorer = opened_tasks(comparison.tasks, config.tasks_data, comparison.limit, folder, tasks)
        if scorer is not None:
            scorer.check(start.folder, read_decoder_config(start.folder).max_position_embeddings)
        return cls(comparison, scorer, start, runtime, out, progress)

    def check(self, held_out: HeldOut | None) -> None:
        """Raise ConfigError where there is nothing to compare on."""
        if self._scorer is None and (held_out is None or not self._config.held_out):
            raise ConfigError(
                "keep_better: there is nothing to compare the models on: no task is named, and the stage holds out nothing to "
                "ask both; name tasks, or raise validation_share"
            )

    def keep(self, held_out: HeldOut | None) -> dict[str, Any]:
        """Compare, and put the model before in the trained one's place where that is worse; metrics on what was found.

        Writes `comparison.json` with the score of every item.
        """
        held_out = held_out if self._config.held_out else None
        before = self._measured(load_trained_decoder(self._start.folder, self._runtime.device, torch.float32), held_out)
        after = self._measured(self._trained(), held_out)
        measures = compare_models(before, after)
        confidence = self._config.confidence
        records = [measure.record(confidence) for measure in measures]
        kept = KEPT_BEFORE if any(record["worse"] for record in records) else KEPT_TRAINED
        items = {name: {when: _plain(of[name]) for when, of in (("before", before), ("after", after))} for name in before}
        write_json(self._out / "comparison.json", {"kept": kept, "measures": records, "items": items}, compact=True)
        if kept == KEPT_BEFORE:
            self._restore()
        metrics = {KEPT: kept, COMPARISON: records}
        self._progress.say(f"  {comparison_sentence(metrics)}")
        return metrics

    def _measured(self, model: Decoder, held_out: HeldOut | None) -> dict[str, MeasuredItems]:
        found: dict[str, MeasuredItems] = {}
        runtime = self._runtime
        with runtime.running():
            if self._scorer is not None:
                with runtime.evaluating(model):
                    scores = self._scorer.item_scores(model, self._start.folder)
                found |= {name: MeasuredItems(items, is_share=True) for name, items in scores.items()}
            if held_out is not None:
                models = ModelRoles({POLICY: PreparedModel(model, None)}, runtime)
                values = held_out.scores(models, self._config.limit)
                known = {str(place): ItemScore(value) for place, value in enumerate(values) if not math.isnan(value)}
                found[held_out.name] = MeasuredItems(known, held_out.lower_is_better)
        return found

    def _trained(self) -> Decoder:
        """What was trained; of an adapter that is not merged, the sum."""
        device = self._runtime.device
        if self._has_model:
            return load_trained_decoder(self._out / "model", device, torch.float32)
        base = load_model(self._start.folder, device, torch.float32)
        return merged(base, read_adapter(self._out / "adapter", base))

    @property
    def _has_model(self) -> bool:
        return self._start.adapter is None or self._start.adapter.merge

    def _restore(self) -> None:
        """Move what was trained aside, and write the model before; an adapter that changes nothing."""
        start, out = self._start, self._out
        if self._has_model:
            with _in_place_of(out / "model") as folder:
                save_trained_decoder(load_trained_decoder(start.folder), folder, tokenizer=start.folder)
        if start.adapter is not None and not start.reads_pictures:
            with _in_place_of(out / "adapter") as folder:
                # a new one, of which the second factors are 0
                model = start.whole("cpu")
                own = {name: parameter for name, parameter in model.named_parameters() if is_trained_by_adapter(name)}
                write_adapter(adapter_of(model, own), load_model(start.folder), folder)


@contextmanager
def _in_place_of(folder: Path) -> Iterator[Path]:
    """A new folder, which takes the place of another one when the block succeeds; that one is moved aside."""
    new, aside = (folder.with_name(f"{folder.name}{ending}") for ending in ("-before", TRAINED))
    shutil.rmtree(new, ignore_errors=True)
    with new_folder(new) as unfinished:
        yield unfinished
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    new.rename(folder)


def _plain(measured: MeasuredItems) -> dict[str, float]:
    return {item: score.score for item, score in measured.items.items()}
