"""The best way to lay a training step out over so many cards, the next best, and what would fit when nothing does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bessemer.core.errors import BessemerError, ConfigError
from bessemer.core.figures import size
from bessemer.distributed.layout import Layout
from bessemer.model.config import ModelConfig
from bessemer.model.costs import flops_per_token
from bessemer.scaling.activations import Recompute
from bessemer.scaling.hardware import Card
from bessemer.scaling.memory import Memory, memory
from bessemer.scaling.timing import Timing, timing
from bessemer.scaling.traffic import Traffic, traffic
from bessemer.scaling.work import WEIGHT_BYTES, Choice, Work
from bessemer.training.config import LoopConfig

_RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
_SECONDS_PER_DAY = 86_400
#: Fewest tokens of a row that a rank of the context axis shall have: below that its products are too thin to pay.
_SHORTEST_PIECE = 2048
#: Of what was too much, what may be enough.
_LESS = 0.9


class DoesNotFitError(BessemerError):
    """No layout of these cards holds the model, or none divides it."""


@dataclass(frozen=True)
class Plan:
    """One way to train, with what it takes."""

    work: Work
    choice: Choice
    memory: Memory
    timing: Timing
    traffic: list[Traffic]

    @property
    def tokens_per_second(self) -> float:
        """Of all cards together."""
        settings = self.work.settings
        return settings.batch_size * settings.context_length / self.timing.step

    @property
    def model_flops_utilisation(self) -> float:
        """FLOPs that the model needs over those that the cards promise in bfloat16 (Chowdhery et al. 2022, appendix B)."""
        needed = flops_per_token(self.work.model, self.work.settings.context_length) * self.tokens_per_second
        return needed / (self.work.card.flops * self.choice.layout.world_size)

    def days(self, tokens: float) -> float:
        """Days of training on so many tokens."""
        return tokens / self.tokens_per_second / _SECONDS_PER_DAY

    def dollars(self, tokens: float, price: float) -> float:
        """What the cards cost for it, at a price an hour each."""
        return self.days(tokens) * 24 * self.choice.layout.world_size * price

    @property
    def fits(self) -> bool:
        """Whether the peak leaves room on the card."""
        return self.memory.peak <= self.work.card.usable_memory

    def settings(self) -> dict[str, Any]:
        """The keys of a recipe's section that ask for this."""
        layout, choice = self.choice.layout, self.choice
        axes = {
            name: getattr(layout, name) for name in ("data_replicate", "data_shard", "context", "tensor", "pipeline", "expert")
        }
        parallel: dict[str, Any] = {name: ranks for name, ranks in axes.items() if ranks > 1}
        if layout.pipeline > 1:
            parallel["pipeline_schedule"] = choice.schedule
        return {
            "parallel": parallel,
            "micro_batch_size": choice.micro_batch_size,
            "activation_checkpointing": choice.recompute,
        }


def evaluate(work: Work, choice: Choice) -> Plan:
    """A plan for a given choice, whether it fits or not."""
    return Plan(work, choice, memory(work, choice), timing(work, choice), traffic(work, choice))


def plans(work: Work, gpus: int, *, count: int = 5) -> list[Plan]:
    """The fastest layouts that fit, best first; of those that differ in nothing but the micro-batch or what is recomputed, the
    fastest.

    Raises DoesNotFitError, with what would fit, when there is none, or with the number that is in the way when the batch or
    the model divides over no layout of so many cards.
    """
    fitting: dict[Layout, Plan] = {}
    smallest: Plan | None = None
    for choice in choices(work, gpus):
        found = memory(work, choice)
        if found.peak > work.card.usable_memory:
            if smallest is None or found.peak < smallest.memory.peak:
                smallest = Plan(work, choice, found, timing(work, choice), [])
            continue
        plan = Plan(work, choice, found, timing(work, choice), [])
        best = fitting.get(choice.layout)
        if best is None or plan.timing.step < best.timing.step:
            fitting[choice.layout] = plan
    if fitting:
        ranked = sorted(fitting.values(), key=lambda plan: plan.timing.step)[:count]
        return [evaluate(work, plan.choice) for plan in ranked]
    if smallest is None:
        raise DoesNotFitError(_nothing_divides(work, gpus))
    raise DoesNotFitError(_nothing_fits(work, gpus, smallest))


def choices(work: Work, gpus: int) -> Iterator[Choice]:
    """Every layout of so many cards that divides the model and the batch, with its micro-batches and what it recomputes."""
    for layout in layouts(work, gpus):
        rows = work.settings.batch_size // layout.data_ranks
        for micro_batch_size in _divisors(rows):
            if micro_batch_size > 1 and _least_memory(work, layout) > work.card.usable_memory:
                break  # a larger micro-batch does not make it fit
            for schedule, stages in _schedules(work, layout, rows // micro_batch_size):
                for recompute in _RECOMPUTE:
                    yield Choice(layout, micro_batch_size, recompute, schedule, stages)


def layouts(work: Work, gpus: int) -> Iterator[Layout]:
    """Every layout of so many cards that the model and the batch divide over. The tensor axis stays within a node."""
    model, settings, per_node = work.model, work.settings, work.card.cards_per_node
    for tensor in _divisors(gpus):
        if tensor > per_node:
            continue
        for pipeline in _divisors(gpus // tensor):
            if pipeline > model.num_hidden_layers or (pipeline > 1 and model.num_nextn_predict_layers):
                continue
            for context in _divisors(gpus // tensor // pipeline):
                if context > 1 and settings.context_length // (context * tensor) < _SHORTEST_PIECE:
                    continue
                data = gpus // (tensor * pipeline * context)
                if settings.batch_size % data:
                    continue
                for shard in _divisors(data):
                    if shard not in (1, data) and (shard * context * tensor) % per_node:
                        continue  # copies are worth their memory where gathering stays within a node, or in whole nodes
                    yield from _with_experts(work, Layout(pipeline, data // shard, shard, context, tensor))


def _with_experts(work: Work, layout: Layout) -> Iterator[Layout]:
    model, settings = work.model, work.settings
    for expert in _divisors(layout.shard_ranks) if model.num_experts else [1]:
        found = Layout(layout.pipeline, layout.data_replicate, layout.data_shard, layout.context, layout.tensor, expert)
        if expert > 1 and expert % layout.context:
            continue
        try:
            found.check(model, settings.context_length)
        except ConfigError:
            continue
        yield found


def _schedules(work: Work, layout: Layout, micro_batches: int) -> Iterator[tuple[str, int]]:
    """Schedules of the pipeline that so many micro-batches can run, with the stages of a rank."""
    ranks = layout.pipeline
    if ranks == 1:
        yield "1f1b", 1
        return
    asked = work.settings.parallel.pipeline_schedule
    names = {"1f1b", "interleaved"} | ({asked} if work.settings.parallel.pipeline > 1 else set())
    for name in sorted(names):
        stages = {"gpipe": 1, "1f1b": 1}.get(name, 2)
        if ranks * stages > work.model.num_hidden_layers or micro_batches < ranks:
            continue
        if name in ("interleaved", "zero_bubble") and micro_batches % ranks:
            continue
        yield name, stages


def _least_memory(work: Work, layout: Layout) -> float:
    """Bytes that weights and gradients alone take on a rank of this layout."""
    everything = work.blocks_of(list(range(work.model.num_hidden_layers)))
    return 2 * WEIGHT_BYTES * everything.stored(layout) / layout.pipeline


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _nothing_divides(work: Work, gpus: int) -> str:
    """Why no layout of so many cards is possible, from the plainest one."""
    settings, model = work.settings, work.model
    batch = settings.batch_size
    rows = [divisor for divisor in _divisors(batch) if divisor <= gpus][-1]
    return (
        f"no layout of {gpus} cards divides batch_size {batch}, {model.num_attention_heads} attention heads and "
        f"{model.num_hidden_layers} layers; with rows alone, {rows} cards can share {batch} rows: change batch_size or --gpus"
    )


def _nothing_fits(work: Work, gpus: int, smallest: Plan) -> str:
    card = work.card
    text = (
        f"the model does not fit {gpus} × {card.name}: the leanest layout ({described(smallest)}) needs "
        f"{size(smallest.memory.peak)} a card, of {size(card.usable_memory)} that a card leaves"
    )
    for factor in (2, 4, 8, 16, 32, 64):
        bigger = _first_fitting(work, gpus * factor)
        if bigger is not None:
            return f"{text}; it would fit {gpus * factor} ({described(bigger)})"
    return f"{text}; a lower context_length, a tensor axis or a card with more memory would help"


def _first_fitting(work: Work, gpus: int) -> Plan | None:
    """The fastest layout of so many cards that fits row by row, or none. The batch grows with the cards where it must."""
    settings = work.settings
    if settings.batch_size % gpus:
        settings = settings.with_changes(batch_size=max(settings.batch_size, gpus))
    bigger = Work(work.model, settings, work.card)
    candidates = (choice for choice in choices(bigger, gpus) if choice.micro_batch_size == 1)
    fitting = [choice for choice in candidates if memory(bigger, choice).peak <= work.card.usable_memory]
    found = [Plan(bigger, choice, memory(bigger, choice), timing(bigger, choice), []) for choice in fitting]
    return min(found, key=lambda plan: plan.timing.step, default=None)


def described(plan: Plan) -> str:
    """A layout in a few words: the axes above 1, the micro-batch, what is recomputed."""
    layout = plan.choice.layout
    axes = [
        f"{name} {getattr(layout, name)}"
        for name in ("data_replicate", "data_shard", "context", "tensor", "pipeline", "expert")
        if getattr(layout, name) > 1
    ]
    recompute = plan.choice.recompute
    again = [] if recompute == "none" else [f"{recompute} checkpointing"]
    return ", ".join([*axes, f"micro-batch {plan.choice.micro_batch_size}", *again])


def what_fits(
    model: ModelConfig,
    settings: LoopConfig,
    memory_bytes: float,
    card: Card,
    layout: Layout = Layout(),  # noqa: B008
    failed: Choice | None = None,
) -> str:
    """What to set so that a step of this layout fits in so many bytes a rank: for a run that is out of memory.

    One line, with the fastest of the micro-batches and kinds of activation checkpointing that fit; or what is needed at least.
    failed: known not to fit, nor does anything that needs nearly as much.
    """
    work = Work(model, settings, card)
    rows = max(1, settings.batch_size // layout.data_ranks)
    tried: list[Plan] = []
    for micro_batch_size in _divisors(rows):
        for recompute in _RECOMPUTE:
            tried.append(evaluate(work, Choice(layout, micro_batch_size, recompute)))
    largest = memory_bytes if failed is None else min(memory_bytes, _LESS * memory(work, failed).peak)
    fitting = [plan for plan in tried if plan.memory.peak <= largest]
    if fitting:
        best = min(fitting, key=lambda plan: plan.timing.step)
        return (
            f"micro_batch_size: {best.choice.micro_batch_size} with activation_checkpointing: {best.choice.recompute} would "
            f"fit: about {size(best.memory.peak)} of {size(memory_bytes)}"
        )
    least = min(tried, key=lambda plan: plan.memory.peak)
    return (
        f"nothing fits {size(memory_bytes)} under this layout: even micro_batch_size: 1 with activation_checkpointing: full "
        f"needs about {size(least.memory.peak)}; shard over more ranks (parallel.data_shard), cut matrices (parallel.tensor), "
        "or take a shorter context_length or a smaller model"
    )


def as_asked(work: Work, gpus: int) -> Plan | None:
    """The layout that the settings name themselves, on so many cards, whether it fits or not; None when they name none or it
    does not divide."""
    settings = work.settings
    if not settings.parallel.model_fields_set:
        return None
    try:
        layout = Layout.of(settings.parallel, gpus)
        layout.check(work.model, settings.context_length)
        rows = layout.rows(0, settings.batch_size)
        each, schedule = settings.micro_batch_size or rows.stop - rows.start, "1f1b"
        if layout.pipeline > 1:
            schedule = settings.parallel.pipeline_schedule
            each = (rows.stop - rows.start) // layout.micro_batches(rows.stop - rows.start, settings.micro_batch_size, schedule)
    except ConfigError:
        return None
    return evaluate(work, Choice(layout, each, settings.activation_checkpointing, schedule, layout.stages_per_rank))


def outcome(found: Sequence[Plan], *, tokens: float, price: float, asked: Plan | None = None) -> dict[str, Any]:
    """Plans as plain values, for JSON and for the terminal. asked: what the recipe itself names."""
    return {
        "card": found[0].work.card.name,
        "gpus": found[0].choice.layout.world_size,
        "tokens": tokens,
        "price_per_gpu_hour": price,
        "parameters": found[0].work.model.parameters(),
        "active_parameters": found[0].work.model.active_parameters(),
        "usable_memory": found[0].work.card.usable_memory,
        "achievable_share_of_peak": found[0].work.card.achievable,
        "plans": [_plain(plan, tokens, price) for plan in found],
        "asked": None if asked is None else _plain(asked, tokens, price),
    }


def _plain(plan: Plan, tokens: float, price: float) -> dict[str, Any]:
    timing = plan.timing
    return {
        "settings": plan.settings(),
        "described": described(plan),
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
