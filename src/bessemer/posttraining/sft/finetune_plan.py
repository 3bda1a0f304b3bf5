"""Plan of a fine-tuning, made before anything is imported or trained: rows, steps, memory, time, and what is cut. The memory of
each method (`finetune_memory`) decides whether all weights or an adapter is tuned. For each method the plan tries smaller
micro-batches, which take no more time, then recomputed blocks, which take a third more; then the next method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

from bessemer.core.environment import free_memory_bytes, resident_memory_bytes
from bessemer.core.errors import ConfigError, SourceError
from bessemer.core.metrics import duration, size
from bessemer.model.activations import Recompute
from bessemer.model.config import ModelConfig
from bessemer.model.device import choose_device, is_fast, product_flops
from bessemer.model.formats import ModelSource
from bessemer.model.vision.costs import PicturesOfStep
from bessemer.posttraining.data.encoding import RowCounts
from bessemer.posttraining.data.examples import Conversation, RowReader
from bessemer.posttraining.data.made import data_name, data_path
from bessemer.posttraining.data.mask import text_parts
from bessemer.posttraining.data.packing import EncodedExample, encode_conversation, fit_conversations, fit_each, pack_examples
from bessemer.posttraining.data.picture_encoding import PictureEncoder, open_picture_encoder
from bessemer.posttraining.data.turns import NothingLearntError, RowError
from bessemer.posttraining.data.understanding import DataPlace
from bessemer.posttraining.sft.config import FinetuneConfig, Method, SFTConfig
from bessemer.posttraining.sft.finetune_inputs import BaseModel, find_columns, read_base
from bessemer.posttraining.sft.finetune_memory import TuningMemory, TuningShape, process_memory, tuning_memory, with_vision
from bessemer.posttraining.sft.stage import gather_conversations
from bessemer.tokenization.tokenizer import Tokenizer
from bessemer.training.data.batch import IGNORE_INDEX
from bessemer.training.data.packing import best_fit
from bessemer.training.starting_model import FROZEN

#: Share of the free memory that a plan uses.
_USABLE = 0.8
#: Share of the measured rate of matmuls that a step reaches; the rest of its time is attention, norms, the loss and the update.
_REACHED = 0.5


def free_bytes(device: torch.device, held: float = 0.0) -> float:
    """Memory that may be taken: on a card by tensors, on a processor by this process, which holds some already; infinite where
    it is unknown."""
    if device.type == "cuda":
        return _USABLE * torch.cuda.mem_get_info(device)[0]
    free = free_memory_bytes()
    return float("inf") if free is None else held + _USABLE * free


class Fitting(NamedTuple):
    """A method of tuning with a step that fits into memory, or else with the smallest step."""

    shape: TuningShape
    memory: TuningMemory


def memory_needs(
    model: ModelConfig,
    shape: TuningShape,
    free: float,
    *,
    rows_given: bool = False,
    recompute: Sequence[Recompute] = ("none",),
    held: float | None = None,
) -> dict[Method, Fitting]:
    """The methods by which a model can be tuned, from most to least memory, each with the largest micro-batch that fits into
    `free` bytes, or with the smallest step. shape: its rows are those of a batch or, with `rows_given`, of a fixed micro-batch.
    recompute: kinds of recomputation to try, the fastest first. held: what the process holds before, whose whole memory is then
    meant (`process_memory`); None: the tensors of a step alone (`tuning_memory`).
    """
    methods: tuple[Method, ...] = ("qlora",) if shape.stored is not None else ("full", "lora", "qlora")
    return {method: _fitting(model, method, shape, free, rows_given, recompute, held) for method in methods}


def _fitting(
    model: ModelConfig,
    method: Method,
    shape: TuningShape,
    free: float,
    rows_given: bool,
    recompute: Sequence[Recompute],
    held: float | None,
) -> Fitting:
    batch = shape.rows * shape.micro_batches
    smallest: Fitting | None = None
    for kind in recompute:
        rows = shape.rows
        while True:
            tried = replace(shape, rows=rows, micro_batches=-(-batch // rows), recompute=kind)
            memory = tuning_memory(model, method, tried) if held is None else process_memory(model, method, tried, held)
            smallest = Fitting(tried, memory)
            if smallest.memory.peak <= free:
                return smallest
            if rows == 1 or rows_given:
                break
            rows = -(-rows // 2)
    assert smallest is not None
    return smallest


def choose_method(needs: Mapping[Method, Fitting], free: float, *, is_quantised: bool = False) -> tuple[Method, str]:
    """The first method of `memory_needs` that fits into memory, and why. Raises ConfigError when none fits."""
    for method, fitting in needs.items():
        if (needed := fitting.memory.peak) <= free:
            larger = list(needs)[: list(needs).index(method)]
            more = "".join(f", {one} {size(needs[one].memory.peak)}" for one in larger)
            of = "memory" if free == float("inf") else f"of {size(free)} that can be used"
            reason = "the model is quantised" if is_quantised else f"it takes about {size(needed)}{more}, {of}"
            return method, reason
    least = list(needs)[-1]
    raise ConfigError(
        f"--method: even {least} takes about {size(needs[least].memory.peak)}, and {size(free)} can be used; take a smaller "
        f"model, a shorter --context-length, or try with --method {least}"
    )


#: Shortest and longest row where the data decide its length, and the number of which the length is a multiple.
_SHORTEST, _LONGEST, _STEP = 64, 2048, 32
#: Lengths of a row that are tried, in lengths of the longest conversation.
_FACTORS = (1, 2, 3, 4)
#: Default batch size.
_CONVERSATIONS = 8
#: Fewest held-out conversations for a comparison.
_FEWEST = 2
#: Signs around learnt text in a shown example, and the most characters shown of each part.
_LEARNT = ("⟦", "⟧")
_SHOWN = 400


@dataclass(frozen=True)
class Sizes:
    """Rows of a pass, their length, rows of a step, and steps."""

    context_length: int
    rows: int
    batch_size: int
    steps: int

    @classmethod
    def of(cls, config: FinetuneConfig, context_length: int, rows: int, batch_size: int) -> Self:
        """Sizes with as many steps as the passes over the data take."""
        return cls(context_length, rows, batch_size, max(1, -(-round(config.epochs * rows) // batch_size)))


@dataclass(frozen=True)
class FinetunePlan:
    """settings: those of `sft`. examples: of held-out conversations that have targets within a row. tokens, learnt: tokens of
    the conversations of a pass, and targets among them. counts: numbers of conversations cut and left out. needs: each method
    with its memory. free: usable bytes. seconds: predicted time of all steps; None where the device's rate is unknown. price:
    of an hour. understood: lines about the data, for a terminal. bad_rows: number of left-out rows. pictures: of a model that
    reads them, what has read those of the data."""

    settings: dict[str, Any]
    training: Sequence[Conversation]
    held_out: Sequence[Conversation]
    examples: Sequence[tuple[Conversation, EncodedExample]]
    base: BaseModel
    sizes: Sizes
    tokens: int
    learnt: int
    counts: RowCounts
    method: Method
    reason: str
    needs: Mapping[Method, Fitting]
    free: float
    seconds: float | None
    price: float | None = None
    understood: Sequence[str] = ()
    bad_rows: int = 0
    pictures: PictureEncoder | None = None

    @property
    def chosen(self) -> Fitting:
        """The chosen method with its micro-batches, recomputation and memory."""
        return self.needs[self.method]

    @property
    def cost(self) -> float | None:
        """Of the steps, in the currency of the price; None without a price or a prediction."""
        return None if self.price is None or self.seconds is None else self.price * self.seconds / 3600

    @property
    def figures(self) -> dict[str, Any]:
        """Plain values, for JSON. free: None where it is unknown."""
        return {
            "conversations": len(self.training),
            "held_out": len(self.held_out),
            **({"bad_rows": self.bad_rows} if self.bad_rows else {}),
            "tokens": self.tokens,
            "learnt_tokens": self.learnt,
            **asdict(self.sizes),
            "method": self.method,
            "reason": self.reason,
            **self.counts.figures,
            "micro_batch_size": self.chosen.shape.rows,
            "activation_checkpointing": self.chosen.shape.recompute,
            "memory_bytes": {method: round(fitting.memory.peak) for method, fitting in self.needs.items()},
            "memory_parts": {part: round(needed) for part, needed in self.chosen.memory.parts.items()},
            "free_bytes": None if self.free == float("inf") else round(self.free),
            "seconds": None if self.seconds is None else float(f"{self.seconds:.4g}"),
            "cost": None if self.cost is None else round(self.cost, 4),
        }

    @property
    def sentences(self) -> list[str]:
        """Lines for a terminal before the training."""
        sizes, shape, memory = self.sizes, self.chosen.shape, self.chosen.memory
        cut = f", in micro-batches of {shape.rows}" if shape.micro_batches > 1 else ""
        again = ", blocks recomputed in the backward pass" if shape.recompute != "none" else ""
        parts = ", ".join(f"{part} {size(needed)}" for part, needed in sorted(memory.parts.items(), key=lambda each: -each[1]))
        lines = [
            f"  {len(self.training):,} conversations to learn from, {len(self.held_out):,} different ones held out; no prompt "
            "of these is learnt, nor a near copy of one",
            f"  {sizes.batch_size} rows of {sizes.context_length:,} tokens a step{cut}, {sizes.steps:,} steps{again}",
            *self.counts.sentences(f"{len(self.training):,} conversations"),
            f"  memory: about {size(memory.peak)} at most; {parts} (not all at once)",
        ]
        if self.seconds is not None:
            cost = "" if self.cost is None else f", and costs about {self.cost:.2f}"
            lines.append(f"  time: training takes about {duration(self.seconds)} on this machine as it is now{cost}")
        return lines

    def rendered_example(self) -> list[str]:
        """The first conversation that fits into a row, as the model reads it, with signs around what it learns; empty if none
        fits."""
        tokenizer = self.base.tokenizer
        for one in self.training:
            if (parts := learnt_parts(one, tokenizer, self.sizes.context_length)) is None:
                continue
            shown = "".join(
                f"{_LEARNT[0]}{_middle_left_out(text)}{_LEARNT[1]}" if is_learnt else _middle_left_out(text)
                for text, is_learnt in parts
            )
            head = f"  a conversation as the model reads it; it learns what stands between {_LEARNT[0]} and {_LEARNT[1]}:"
            return [head, *(f"    {line}" for line in shown.rstrip("\n").split("\n"))]
        return []


def plan_finetuning(
    config: FinetuneConfig, source: ModelSource, data: str, *, seed: int, device: str, scratch: Path
) -> FinetunePlan:
    """Read the data and the model's settings, and choose settings that are not given. data: a file, a folder, or the name of a
    data set of the hub. scratch: a folder for the tokenizer's files. Raises SourceError, RequestError or ArtefactError for data
    and models that cannot be used, ConfigError for settings, and a model that memory does not hold.
    """
    settings = settings_of(config, data)
    understood: list[str] = []
    reader = RowReader(config.on_bad_row, understood.append)
    training, held_out = gather_conversations(SFTConfig.parse(settings), None, Path(), seed, reader=reader)
    # each conversation counts once, however many copies are held out
    held_out = list({one.id: one for one in held_out}.values())
    if len(held_out) < _FEWEST or not training:
        raise SourceError(
            f"{data}: of {len(training) + len(held_out):,} rows {len(held_out):,} different ones would be held out, too few to "
            "tell whether the model got better; give more rows, or a larger --held-out"
        )
    base, chosen_device = read_base(source, scratch), choose_device(device)
    tokenizer, limit = base.tokenizer, base.config.max_position_embeddings
    longest = config.context_length or min(_LONGEST, limit)
    pictures = None
    if base.vision is not None and base.folder is not None:
        pictures = open_picture_encoder(base.folder, tokenizer, scratch / "pictures.bin")
    examples, _ = fit_conversations([*training, *held_out], tokenizer, longest, config.truncate, pictures)
    lengths = [len(one.tokens) for one in examples]
    context = config.context_length or row_length(lengths, limit)
    fitted, counts = fit_conversations(training, tokenizer, context, config.truncate, pictures)
    rows = max(1, pack_examples(fitted, tokenizer, context).tokens_BT.shape[0])
    batch_size = config.batch_size or max(1, round(_CONVERSATIONS * rows / len(training)))
    sizes, dtype = Sizes.of(config, context, rows, batch_size), tuning_dtype(config, chosen_device)
    shown = PicturesOfStep()
    if pictures is not None and base.vision is not None and not pictures.file.is_empty:
        table = pictures.file.table()
        count = len(table.tiles) if table.sizes is None else int(table.grids.prod(1).sum())
        shown = PicturesOfStep.of_tiles(base.vision, batch_size * count / (rows * (1 + len(held_out) / len(training))))
    chosen, needs, free = _method(config, base, batch_size, context, dtype, chosen_device, shown)
    return FinetunePlan(
        settings=settings,
        training=training,
        held_out=held_out,
        examples=_within(held_out, tokenizer, context, config, pictures),
        pictures=pictures,
        base=base,
        sizes=sizes,
        tokens=sum(len(one.tokens) for one in fitted),
        learnt=sum(int((one.targets != IGNORE_INDEX).sum()) for one in fitted),
        counts=counts,
        method=chosen[0],
        reason=chosen[1],
        needs=needs,
        free=free,
        seconds=_seconds(base.config, chosen[0], needs[chosen[0]].shape, sizes, dtype, chosen_device),
        price=config.price_per_hour,
        understood=understood,
        bad_rows=len(reader.bad),
    )


def settings_of(config: FinetuneConfig, data: str | Path) -> dict[str, Any]:
    """The settings of `sft` about the conversations that it reads. Raises SourceError for a file whose columns are not
    recognised, ConfigError where files name them differently.
    """
    own = data_name(data)
    columns = find_columns(_as_typed(own), config.prompt_column, config.answer_column)
    others = {data_name(name): weight for name, weight in config.also.items()}
    for other in others:
        other_columns = find_columns(_as_typed(other), config.prompt_column, config.answer_column)
        if other_columns != columns:
            raise ConfigError(f"{other}: its columns are {other_columns}, and those of {data} are {columns}; call them alike")
    settings: dict[str, Any] = {
        "data": [own, *others],
        "weights": others,
        "validation_share": config.held_out,
        "on_bad_row": config.on_bad_row,
    }
    if columns is not None:
        settings |= dict(zip(("prompt_column", "answer_column"), columns, strict=True))
    return settings


def _as_typed(name: str) -> DataPlace:
    """The place of data in messages: a path below the working directory is relative to it."""
    place, here = data_path(name, Path(), {}), Path.cwd()
    return place.relative_to(here) if isinstance(place, Path) and place.is_relative_to(here) else place


def row_length(lengths: Sequence[int], most: int) -> int:
    """The length of rows, at most `most`, that fits the longest conversation and leaves the fewest places empty: that
    conversation's length, or a small multiple, rounded up."""
    shortest = max(_SHORTEST, -(-max(lengths, default=1) // _STEP) * _STEP)
    tried = [length for factor in _FACTORS if (length := shortest * factor) <= min(_LONGEST, most)]
    if not tried:
        return min(shortest, _LONGEST, most)
    return min(tried, key=lambda length: (int(best_fit(lengths, length).max(initial=-1)) + 1) * length)


def product_dtype(device: torch.device) -> torch.dtype:
    """Dtype of matmuls on a device."""
    return torch.bfloat16 if is_fast(torch.bfloat16, device) else torch.float32


def learnt_parts(conversation: Conversation, tokenizer: Tokenizer, longest: int) -> list[tuple[str, bool]] | None:
    """A conversation's text, or that of its last turn where each turn is an example, in parts, each with whether it is learnt.
    None where it does not fit into a row, or nothing in it is learnt."""
    try:
        *_, encoded = encode_conversation(conversation, tokenizer)
    except (NothingLearntError, RowError):
        return None
    return text_parts(encoded, tokenizer) if encoded.inputs <= longest and encoded.is_learnt.any() else None


def _middle_left_out(text: str) -> str:
    half = _SHOWN // 2
    return text if len(text) <= _SHOWN else f"{text[:half]} … {text[-half:]}"


def tuning_dtype(config: FinetuneConfig, device: torch.device) -> torch.dtype:
    """Dtype of matmuls: that of the frozen weights if `base_dtype` asks for it, else one that the device multiplies fast."""
    given = {"float32": torch.float32, "bf16": torch.bfloat16}.get(config.base_dtype)
    return product_dtype(device) if given is None else given


def _method(
    config: FinetuneConfig,
    base: BaseModel,
    batch_size: int,
    context: int,
    dtype: torch.dtype,
    device: torch.device,
    shown: PicturesOfStep,
) -> tuple[tuple[Method, str], Mapping[Method, Fitting], float]:
    """The chosen method and why, each method's memory, and the usable bytes. shown: of pictures in a batch."""
    rows_given, rows = config.tokens_per_batch is not None, batch_size
    if config.tokens_per_batch is not None:
        rows = max(1, min(batch_size, config.tokens_per_batch // context))
    shape = TuningShape(
        rows=rows,
        length=context,
        dtype_bytes=dtype.itemsize,
        device=device.type,
        rank=config.rank,
        dora=config.dora,
        dropout=config.dropout > 0,
        frozen=FROZEN[config.codes],
        stored=base.quantised,
        patterns=tuple(config.target_modules),
        whole=tuple(config.modules_to_save),
        paged=config.paged_optimizer,
        micro_batches=-(-batch_size // rows),
    )
    recompute: tuple[Recompute, ...] = ("none", "full") if config.checkpointing == "auto" else (config.checkpointing,)
    held = float(resident_memory_bytes() or 0) if device.type == "cpu" else None
    free = free_bytes(device, held or 0.0)
    if (vision := base.vision) is not None:
        # the encoder's memory is that of a whole batch, since a row may hold more pictures than another
        needs: dict[Method, Fitting] = {}
        whole: tuple[Method, ...] = ("full", "lora")
        for method in whole:
            wide = replace(shape, wide_base=True)
            largest = memory_needs(base.config, wide, float("inf"), rows_given=rows_given, held=held)[method]
            of_vision = with_vision(largest.memory, vision, method, shown, wide).parts["encoder of pictures"]
            fittings = memory_needs(base.config, wide, free - of_vision, rows_given=rows_given, recompute=recompute, held=held)
            memory = with_vision(fittings[method].memory, vision, method, shown, fittings[method].shape)
            needs[method] = fittings[method]._replace(memory=memory)
        if config.method == "qlora" or config.base_dtype in FROZEN:
            raise ConfigError(f"--method: {base.name} reads pictures, and is tuned by full or lora, whose weights are whole")
    else:
        needs = memory_needs(base.config, shape, free, rows_given=rows_given, recompute=recompute, held=held)
    if config.method != "auto":
        if config.method not in needs:
            raise ConfigError(f"--method: {config.method} is of whole weights, and {base.name} is quantised; take qlora")
        peak = needs[config.method].memory.peak
        return (config.method, f"as asked; it takes about {size(peak)}"), needs, free
    wanted: tuple[Method, ...] = ("full", "lora", "qlora")
    if config.base_dtype in ("int8", "int4", "nf4"):
        wanted = ("qlora",)
    elif (
        config.base_dtype != "auto"
        or config.target_modules
        or config.modules_to_save
        or config.dora
        or config.rslora
        or config.alpha
        or config.dropout
    ):
        wanted = ("lora", "qlora")
    possible = {method: fitting for method, fitting in needs.items() if method in wanted} or needs
    return choose_method(possible, free, is_quantised=base.quantised is not None), needs, free


def _seconds(
    model: ModelConfig, method: Method, shape: TuningShape, sizes: Sizes, dtype: torch.dtype, device: torch.device
) -> float | None:
    """Seconds of all steps, from this processor's measured rate of matmuls; None on other devices. A token takes 6 FLOPs for
    each trained weight, 4 for each frozen one, and 2 more for each where blocks are recomputed.
    """
    if device.type != "cpu":
        return None
    per_weight = (6 if method == "full" else 4) + (2 if shape.recompute == "full" else 0)
    tokens = sizes.steps * sizes.batch_size * sizes.context_length
    flops = model.flops_per_token(sizes.context_length) / 6 * per_weight * tokens
    return flops / (_REACHED * product_flops(dtype))


def _within(
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    context: int,
    config: FinetuneConfig,
    pictures: PictureEncoder | None,
) -> list[tuple[Conversation, EncodedExample]]:
    """The conversations with targets within a row, each with its last example."""
    fitted, _ = fit_each(conversations, tokenizer, context, config.truncate, pictures)
    fitting = [(one, examples[-1]) for one, examples in zip(conversations, fitted, strict=True) if examples]
    if len(fitting) < _FEWEST:
        raise SourceError(
            f"{len(fitting):,} conversations held out have an answer within {context:,} tokens; raise --context-length"
        )
    return fitting
