"""Planner: the fastest layouts of a training step on a number of GPUs, or what would fit when nothing does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bessemer.core.errors import BessemerError, ConfigError
from bessemer.core.metrics import size
from bessemer.distributed.layout import Layout
from bessemer.model.activations import Recompute
from bessemer.model.config import ModelConfig
from bessemer.scaling.hardware import Card
from bessemer.scaling.job import WEIGHT_BYTES, Candidate, PlannedJob
from bessemer.scaling.memory import Memory, assumed_states, memory
from bessemer.scaling.timing import Timing, Traffic, timing, traffic
from bessemer.training.config import LoopConfig

_RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
_SECONDS_PER_DAY = 86_400
#: Fewest tokens of a row per rank of the context axis; smaller matmuls are inefficient.
_SHORTEST_CHUNK = 2048
#: Largest memory of a suggestion, as a fraction of that of a candidate that ran out of memory.
_LESS = 0.9


class DoesNotFitError(BessemerError):
    """No layout of these GPUs fits the model, or none divides it."""


@dataclass(frozen=True)
class Plan:
    """A candidate with its memory, step time and communication."""

    job: PlannedJob
    candidate: Candidate
    memory: Memory
    timing: Timing
    traffic: list[Traffic]

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all GPUs together."""
        settings = self.job.settings
        return settings.batch_size * settings.context_length / self.timing.step

    @property
    def model_flops_utilisation(self) -> float:
        """FLOPs of the model over the GPUs' peak in bfloat16 (Chowdhery et al. 2022, appendix B)."""
        needed = self.job.model.flops_per_token(self.job.settings.context_length) * self.tokens_per_second
        return needed / (self.job.card.flops * self.candidate.layout.world_size)

    def days(self, tokens: float) -> float:
        """Days of training on a number of tokens."""
        return tokens / self.tokens_per_second / _SECONDS_PER_DAY

    def dollars(self, tokens: float, price: float) -> float:
        """Cost of the GPUs for a number of tokens, at a price per GPU hour."""
        return self.days(tokens) * 24 * self.candidate.layout.world_size * price

    @property
    def fits(self) -> bool:
        """Whether the peak fits the usable memory."""
        return self.memory.peak <= self.job.card.usable_memory

    def settings(self) -> dict[str, Any]:
        """The recipe settings of this plan."""
        candidate, parallel = self.candidate, dict[str, Any](_axes(self.candidate.layout))
        if candidate.layout.pipeline > 1:
            parallel["pipeline_schedule"] = candidate.schedule
        return {
            "parallel": parallel,
            "micro_batch_size": candidate.micro_batch_size,
            "activation_checkpointing": candidate.recompute,
        }


def evaluate(job: PlannedJob, candidate: Candidate) -> Plan:
    """The plan of a candidate, whether it fits or not."""
    return Plan(job, candidate, memory(job, candidate), timing(job, candidate), traffic(job, candidate))


def plans(job: PlannedJob, gpus: int, *, count: int = 5) -> list[Plan]:
    """The fastest plans that fit, best first; one for each layout.

    Raises DoesNotFitError, with what would fit, when there is none, or with the numbers that do not divide when no layout of
    `gpus` divides the batch and the model.
    """
    fitting: dict[Layout, Plan] = {}
    smallest: Plan | None = None
    for candidate in candidates(job, gpus):
        needed = memory(job, candidate)
        if needed.peak > job.card.usable_memory:
            if smallest is None or needed.peak < smallest.memory.peak:
                smallest = Plan(job, candidate, needed, timing(job, candidate), [])
            continue
        plan = Plan(job, candidate, needed, timing(job, candidate), [])
        best = fitting.get(candidate.layout)
        if best is None or plan.timing.step < best.timing.step:
            fitting[candidate.layout] = plan
    if fitting:
        ranked = sorted(fitting.values(), key=lambda plan: plan.timing.step)[:count]
        return [evaluate(job, plan.candidate) for plan in ranked]
    if smallest is None:
        raise DoesNotFitError(_nothing_divides(job, gpus))
    raise DoesNotFitError(_nothing_fits(job, gpus, smallest))


def candidates(job: PlannedJob, gpus: int) -> Iterator[Candidate]:
    """Every layout of `gpus` that divides the model and the batch, with every micro-batch size, schedule and recomputation."""
    for layout in layouts(job, gpus):
        rows = job.settings.batch_size // layout.data_ranks
        for micro_batch_size in _divisors(rows):
            if job.settings.rows_conflict(layout.data_ranks, micro_batch_size) is not None:
                continue
            if micro_batch_size > 1 and _least_memory(job, layout) > job.card.usable_memory:
                # a larger micro-batch needs more memory still
                break
            for schedule, stages in _schedules(job, layout, rows // micro_batch_size):
                for recompute in _RECOMPUTE:
                    yield Candidate(layout, micro_batch_size, recompute, schedule, stages)


def layouts(job: PlannedJob, gpus: int) -> Iterator[Layout]:
    """Every layout of `gpus` that divides the model and the batch. The tensor axis stays within a node."""
    model, settings, per_node = job.model, job.settings, job.card.cards_per_node
    for tensor in _divisors(gpus):
        if tensor > per_node:
            continue
        for pipeline in _divisors(gpus // tensor):
            if pipeline > model.num_hidden_layers:
                continue
            if pipeline > 1 and (model.num_nextn_predict_layers or settings.batch_size_warmup is not None):
                continue
            for context in _divisors(gpus // tensor // pipeline):
                if context > 1 and settings.context_length // (context * tensor) < _SHORTEST_CHUNK:
                    continue
                data = gpus // (tensor * pipeline * context)
                if settings.batch_size % data:
                    continue
                for shard in _divisors(data):
                    if shard not in (1, data) and (shard * context * tensor) % per_node:
                        # replicas pay where all-gathers stay within a node or within whole nodes
                        continue
                    yield from _with_experts(job, Layout(pipeline, data // shard, shard, context, tensor))


def _with_experts(job: PlannedJob, layout: Layout) -> Iterator[Layout]:
    model, settings = job.model, job.settings
    for expert in _divisors(layout.shard_ranks) if model.num_experts else [1]:
        with_experts = replace(layout, expert=expert)
        if expert > 1 and expert % layout.context:
            continue
        try:
            with_experts.check(model, settings.context_length)
        except ConfigError:
            continue
        yield with_experts


def _schedules(job: PlannedJob, layout: Layout, micro_batches: int) -> Iterator[tuple[str, int]]:
    """Pipeline schedules that can run `micro_batches`, with the stages per rank."""
    ranks = layout.pipeline
    if ranks == 1:
        yield "1f1b", 1
        return
    configured = job.settings.parallel.pipeline_schedule
    names = {"1f1b", "interleaved"} | ({configured} if job.settings.parallel.pipeline > 1 else set())
    for name in sorted(names):
        stages = {"gpipe": 1, "1f1b": 1}.get(name, 2)
        if ranks * stages > job.model.num_hidden_layers or micro_batches < ranks:
            continue
        if name in ("interleaved", "zero_bubble") and micro_batches % ranks:
            continue
        yield name, stages


def _least_memory(job: PlannedJob, layout: Layout) -> float:
    """Bytes of weights and gradients on a rank of this layout."""
    everything = job.blocks_of(list(range(job.model.num_hidden_layers)))
    return 2 * WEIGHT_BYTES * everything.stored(layout) / layout.pipeline


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _nothing_divides(job: PlannedJob, gpus: int) -> str:
    """Why no layout of `gpus` is possible."""
    settings, model = job.settings, job.model
    batch = settings.batch_size
    rows = [divisor for divisor in _divisors(batch) if divisor <= gpus][-1]
    return (
        f"no layout of {gpus} cards divides batch_size {batch}, {model.num_attention_heads} attention heads and "
        f"{model.num_hidden_layers} layers; with rows alone, {rows} cards can share {batch} rows: change batch_size or --gpus"
    )


def _nothing_fits(job: PlannedJob, gpus: int, smallest: Plan) -> str:
    card = job.card
    text = (
        f"the model does not fit {gpus} × {card.name}: the leanest layout ({describe(smallest)}) needs "
        f"{size(smallest.memory.peak)} a card, of {size(card.usable_memory)} that a card leaves"
    )
    for factor in (2, 4, 8, 16, 32, 64):
        bigger = _first_fitting(job, gpus * factor)
        if bigger is not None:
            return f"{text}; it would fit {gpus * factor} ({describe(bigger)})"
    return f"{text}; a lower context_length, a tensor axis or a card with more memory would help"


def _first_fitting(job: PlannedJob, gpus: int) -> Plan | None:
    """The fastest plan on `gpus` that fits with micro-batches of one row, or None. The batch grows with the GPUs where it
    must."""
    settings = job.settings
    if settings.batch_size % gpus:
        settings = settings.with_changes(batch_size=max(settings.batch_size, gpus))
    bigger = PlannedJob(job.model, settings, job.card)
    row_by_row = (candidate for candidate in candidates(bigger, gpus) if candidate.micro_batch_size == 1)
    fitting = [candidate for candidate in row_by_row if memory(bigger, candidate).peak <= job.card.usable_memory]
    possible = [Plan(bigger, candidate, memory(bigger, candidate), timing(bigger, candidate), []) for candidate in fitting]
    return min(possible, key=lambda plan: plan.timing.step, default=None)


def _axes(layout: Layout) -> dict[str, int]:
    """The axes of more than one rank."""
    names = ("data_replicate", "data_shard", "context", "tensor", "pipeline", "expert")
    return {name: ranks for name in names if (ranks := getattr(layout, name)) > 1}


def describe(plan: Plan) -> str:
    """A plan in a few words: the axes above 1, the micro-batch, the recomputation."""
    axes = [f"{name} {ranks}" for name, ranks in _axes(plan.candidate.layout).items()]
    recompute = plan.candidate.recompute
    again = [] if recompute == "none" else [f"{recompute} checkpointing"]
    return ", ".join([*axes, f"micro-batch {plan.candidate.micro_batch_size}", *again])


def suggest_settings(
    model: ModelConfig,
    settings: LoopConfig,
    memory_bytes: float,
    card: Card,
    layout: Layout = Layout(),  # noqa: B008
    failed: Candidate | None = None,
) -> str:
    """Settings that make a step of this layout fit in `memory_bytes` per rank, for a run that is out of memory.

    One line, with the fastest micro-batch size and activation checkpointing that fit, or the least memory needed. failed: a
    candidate known not to fit; others must need clearly less.
    """
    job = PlannedJob(model, settings, card)
    rows = max(1, settings.batch_size // layout.data_ranks)
    tried: list[Plan] = []
    for micro_batch_size in _divisors(rows):
        if settings.rows_conflict(layout.data_ranks, micro_batch_size) is not None:
            continue
        for recompute in _RECOMPUTE:
            tried.append(evaluate(job, Candidate(layout, micro_batch_size, recompute)))
    largest = memory_bytes if failed is None else min(memory_bytes, _LESS * memory(job, failed).peak)
    fitting = [plan for plan in tried if plan.memory.peak <= largest]
    if fitting:
        best = min(fitting, key=lambda plan: plan.timing.step)
        return (
            f"micro_batch_size: {best.candidate.micro_batch_size} with activation_checkpointing: {best.candidate.recompute} "
            f"would fit: about {size(best.memory.peak)} of {size(memory_bytes)}"
        )
    least = min(tried, key=lambda plan: plan.memory.peak)
    return (
        f"nothing fits {size(memory_bytes)} under this layout: even micro_batch_size: 1 with activation_checkpointing: full "
        f"needs about {size(least.memory.peak)}; shard over more ranks (parallel.data_shard), cut matrices (parallel.tensor), "
        "or take a shorter context_length or a smaller model"
    )


def requested_plan(job: PlannedJob, gpus: int) -> Plan | None:
    """`configured_plan` where the settings name a layout, micro-batches or recomputation; None when they name none of it or
    the layout does not divide."""
    settings = job.settings
    if (
        not settings.parallel.model_fields_set
        and not {"micro_batch_size", "activation_checkpointing"} & settings.model_fields_set
    ):
        return None
    try:
        return configured_plan(job, gpus)
    except ConfigError:
        return None


def configured_plan(job: PlannedJob, gpus: int) -> Plan:
    """The plan of the settings as they are, on `gpus`, whether it fits or not.

    Raises ConfigError, as a run does, where their layout does not divide the GPUs, the model or the batch.
    """
    settings = job.settings
    layout = Layout.of(settings.parallel, gpus)
    layout.check(job.model, settings.context_length)
    rows = layout.rows(0, settings.batch_size)
    each, schedule = settings.micro_batch_size or rows.stop - rows.start, "1f1b"
    if layout.pipeline > 1:
        schedule = settings.parallel.pipeline_schedule
        each = (rows.stop - rows.start) // layout.micro_batches(rows.stop - rows.start, settings.micro_batch_size, schedule)
    return evaluate(job, Candidate(layout, each, settings.activation_checkpointing, schedule, layout.stages_per_rank))


def plan_summary(plans: Sequence[Plan], *, tokens: float, price: float, asked: Plan | None = None) -> dict[str, Any]:
    """Plans as plain values, for JSON and the terminal. asked: the plan of the recipe's own layout."""
    job = plans[0].job
    summary = {
        "card": job.card.name,
        "gpus": plans[0].candidate.layout.world_size,
        "tokens": tokens,
        "price_per_gpu_hour": price,
        "parameters": job.model.parameters(),
        "active_parameters": job.model.active_parameters(),
        "usable_memory": job.card.usable_memory,
        "achievable_share_of_peak": job.card.achievable,
        "plans": [_plain(plan, tokens, price) for plan in plans],
        "asked": None if asked is None else _plain(asked, tokens, price),
    }
    assumed = assumed_states(job)
    return summary if assumed is None else summary | {"assumed_states": assumed}


def _plain(plan: Plan, tokens: float, price: float) -> dict[str, Any]:
    timing = plan.timing
    return {
        "settings": plan.settings(),
        "described": describe(plan),
        "memory": plan.memory.kinds | {"peak": plan.memory.peak},
        "traffic": [
            {
                "axis": kind.axis,
                "operation": kind.operation,
                "ranks": kind.ranks,
                "count": kind.count,
                "bytes_sent": kind.sent,
            }
            for kind in plan.traffic
        ],
        "seconds": {
            "step": timing.step,
            "products": timing.products,
            "attention": timing.attention,
            "computed again": timing.recomputed,
            "memory traffic": timing.moved,
            "communication, exposed": timing.exposed,
            "communication, hidden": timing.communication - timing.exposed,
            "pipeline bubble": timing.bubble,
            "optimizer": timing.optimizer,
        },
        "tokens_per_second": plan.tokens_per_second,
        "model_flops_utilisation": plan.model_flops_utilisation,
        "days": plan.days(tokens),
        "dollars": plan.dollars(tokens, price),
    }
