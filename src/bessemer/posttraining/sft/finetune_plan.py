"""What a fine-tuning takes, computed before anything is imported or trained: rows, steps, and memory by method.

All weights are tuned, or an adapter, by the memory that each takes. Of a weight in float32, full tuning with AdamW takes 16
bytes: 4 for itself, 4 for its gradient, 8 for two means; where products are computed in half precision, 2 more for the copy
that they read. Beside a frozen weight only an adapter has gradients and means: a matrix of the blocks takes the bytes of the
dtype in which products read it; one of 4 bits 5/8 of a byte, with its scale. Embedding and head lie in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch

from bessemer.core.environment import free_memory_bytes
from bessemer.core.errors import ConfigError, SourceError
from bessemer.core.metrics import size
from bessemer.model.config import ModelConfig
from bessemer.model.device import choose_device, is_fast
from bessemer.model.formats import ModelSource
from bessemer.posttraining.data.examples import Conversation, RowReader
from bessemer.posttraining.data.made import data_name, data_path
from bessemer.posttraining.data.mask import text_parts
from bessemer.posttraining.data.packing import EncodedExample, encode_conversation, fit_conversations, fit_each, pack_examples
from bessemer.posttraining.data.turns import NothingLearntError, RowError
from bessemer.posttraining.sft.config import FinetuneConfig, Method, SFTConfig
from bessemer.posttraining.sft.finetune_inputs import BaseModel, find_columns, read_base
from bessemer.posttraining.sft.stage import gather_conversations
from bessemer.tokenization.tokenizer import Tokenizer
from bessemer.training.data.batches import IGNORE_INDEX
from bessemer.training.data.packing import best_fit
from bessemer.training.logit_chunks import chunk_size

#: Share of the free memory that is counted on.
_USABLE = 0.8
#: Bytes of a trained weight and of a frozen one in float32, and of one of 4 bits in groups of 32.
_TRAINED, _FLOAT32, _CODES = 16.0, 4.0, 0.625
#: Memory for the backward pass of a block in half precision, as a share of that in float32: residual states and norms
#: stay in float32.
_HALF_KEPT = 0.7


def free_bytes(device: torch.device) -> float:
    """Memory that tensors may take on a device; infinite where it is unknown."""
    if device.type == "cuda":
        return _USABLE * torch.cuda.mem_get_info(device)[0]
    free = free_memory_bytes()
    return float("inf") if free is None else _USABLE * free


def needed_bytes(
    model: ModelConfig,
    method: Method,
    rank: int,
    tokens: int,
    quantised: float | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> float:
    """Estimated peak of a step on `tokens` tokens at once. quantised: bytes of the model as it is, where it is quantised.
    dtype: of products. device: its kind, as PyTorch names it."""
    weights, ends = model.parameters(), model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    # operands of products: the float32 weights, or a copy
    width, is_half = float(dtype.itemsize), dtype != torch.float32
    # kept for the backward pass of a block: about 16 states of the model's width and 4 of the feed-forward's, in float32
    kept = 4.0 * tokens * model.num_hidden_layers * (16 * model.hidden_size + 4 * model.intermediate_size)
    kept *= _HALF_KEPT if is_half else 1.0
    # logits of a chunk of tokens, and those of a block of it in float32
    chunk = chunk_size(device)
    logits = model.vocab_size * min(tokens, chunk.tokens(model.vocab_size))
    kept += width * logits + 4.0 * min(logits, chunk.max_block_logits)
    copied = width if is_half else 0.0
    if method == "full":
        return (_TRAINED + copied) * weights + kept
    # each layer's matrices have about as many outputs and inputs as seven of the model's width and three of the feed-forward's
    adapter = rank * model.num_hidden_layers * (11 * model.hidden_size + 3 * model.intermediate_size)
    trained = (_TRAINED + copied) * adapter + kept + copied * model.vocab_size * model.hidden_size
    if method == "lora":
        return width * (weights - ends) + _FLOAT32 * ends + trained
    frozen = _CODES * (weights - ends) + _FLOAT32 * ends if quantised is None else quantised
    # the largest matrix, dequantised for its product
    return frozen + trained + (_FLOAT32 + copied) * model.hidden_size * model.intermediate_size


def memory_needs(
    model: ModelConfig,
    rank: int,
    tokens: int,
    quantised: float | None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[Method, float]:
    """`needed_bytes` of each way in which a model can be tuned, the one that takes most first."""
    methods: tuple[Method, ...] = ("qlora",) if quantised is not None else ("full", "lora", "qlora")
    return {method: needed_bytes(model, method, rank, tokens, quantised, dtype=dtype, device=device) for method in methods}


def choose_method(
    model: ModelConfig,
    rank: int,
    tokens: int,
    free: float,
    quantised: float | None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Method, str]:
    """The first way to tune that memory holds, and why. dtype, device: as of `needed_bytes`. Raises ConfigError when it holds
    none."""
    needs = memory_needs(model, rank, tokens, quantised, dtype=dtype, device=device)
    for method, needed in needs.items():
        if needed <= free:
            larger = list(needs)[: list(needs).index(method)]
            more = "".join(f", {one} {size(needs[one])}" for one in larger)
            of = "memory" if free == float("inf") else f"of {size(free)} that can be used"
            reason = "the model is quantised" if quantised is not None else f"it takes about {size(needed)}{more}, {of}"
            return method, reason
    least = list(needs)[-1]
    raise ConfigError(
        f"--method: even {least} takes about {size(needs[least])}, and {size(free)} can be used; take a smaller model, a "
        f"shorter --context-length, or try with --method {least}"
    )


#: Bounds of a row's length where the data decide, what it is a multiple of, and how many of the longest conversation fit.
_SHORTEST, _LONGEST, _STEP = 64, 2048, 32
_FACTORS = (1, 2, 3, 4)
#: Default batch size.
_CONVERSATIONS = 8
#: Fewest held-out conversations for a comparison.
_FEWEST = 2
#: Around what is learnt, where an example is shown, and characters shown of a part of one.
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
    """settings: which conversations `sft` reads. examples: of those held out that have something to learn within a row.
    tokens, learnt: of the conversations of a pass, and those of them that are targets. needs: peak memory by method, in bytes.
    free: that can be used. understood: lines about the data, for a terminal. bad_rows: number of rows that are left out."""

    settings: dict[str, Any]
    training: Sequence[Conversation]
    held_out: Sequence[Conversation]
    examples: Sequence[tuple[Conversation, EncodedExample]]
    base: BaseModel
    sizes: Sizes
    tokens: int
    learnt: int
    method: Method
    reason: str
    needs: Mapping[Method, float]
    free: float
    understood: Sequence[str] = ()
    bad_rows: int = 0

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
            "memory_bytes": {method: round(needed) for method, needed in self.needs.items()},
            "free_bytes": None if self.free == float("inf") else round(self.free),
        }

    @property
    def sentences(self) -> list[str]:
        """Lines for a terminal before the training."""
        sizes = self.sizes
        return [
            f"  {len(self.training):,} conversations to learn from, {len(self.held_out):,} different ones held out; "
            f"{sizes.batch_size} rows of {sizes.context_length:,} tokens a step, {sizes.steps:,} steps",
        ]

    def rendered_example(self) -> list[str]:
        """The first conversation that is learnt whole, as the model reads it, what it learns between brackets; nothing where
        each is longer than a row."""
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
    """Read the data and the model's settings, and choose what is left open.

    data: a file, a folder, or the name of a data set of the hub. scratch: a folder for files of the tokenizer. Raises
    SourceError, RequestError or ArtefactError for data and models that cannot be used, ConfigError for settings, and a model
    that memory does not hold.
    """
    settings = settings_of(config, data)
    understood: list[str] = []
    reader = RowReader(config.on_bad_row, understood.append)
    training, held_out = gather_conversations(SFTConfig.parse(settings), None, Path(), seed, reader=reader)
    # copies of a conversation count once as evidence
    held_out = list({one.id: one for one in held_out}.values())
    if len(held_out) < _FEWEST or not training:
        raise SourceError(
            f"{data}: of {len(training) + len(held_out):,} rows {len(held_out):,} different ones would be held out, too few to "
            "tell whether the model got better; give more rows, or a larger --held-out"
        )
    base, chosen_device = read_base(source, scratch), choose_device(device)
    tokenizer, limit = base.tokenizer, base.config.max_position_embeddings
    longest = config.context_length or min(_LONGEST, limit)
    lengths = [len(one.tokens) for one in fit_conversations([*training, *held_out], tokenizer, longest, config.truncate)[0]]
    context = config.context_length or row_length(lengths, limit)
    fitted = fit_conversations(training, tokenizer, context, config.truncate)[0]
    rows = max(1, pack_examples(fitted, tokenizer, context).tokens_BT.shape[0])
    batch_size = config.batch_size or max(1, round(_CONVERSATIONS * rows / len(training)))
    chosen, needs, free = _method(config, base, batch_size * context, chosen_device)
    return FinetunePlan(
        settings=settings,
        training=training,
        held_out=held_out,
        examples=_within(held_out, tokenizer, context, config),
        base=base,
        sizes=Sizes.of(config, context, rows, batch_size),
        tokens=sum(len(one.tokens) for one in fitted),
        learnt=sum(int((one.targets != IGNORE_INDEX).sum()) for one in fitted),
        method=chosen[0],
        reason=chosen[1],
        needs=needs,
        free=free,
        understood=understood,
        bad_rows=len(reader.bad),
    )


def settings_of(config: FinetuneConfig, data: str | Path) -> dict[str, Any]:
    """The settings of `sft` that say which conversations it reads.

    Raises SourceError for a file whose columns cannot be told, ConfigError where files call them differently.
    """
    own = data_name(data)
    columns = find_columns(data_path(own, Path(), {}), config.prompt_column, config.answer_column)
    others = {data_name(name): weight for name, weight in config.also.items()}
    for other in others:
        other_columns = find_columns(data_path(other, Path(), {}), config.prompt_column, config.answer_column)
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


def row_length(lengths: Sequence[int], most: int) -> int:
    """The length of rows, within the model's context, that hold the longest conversation and leave the fewest tokens empty: a
    few times that conversation's length, rounded up."""
    shortest = max(_SHORTEST, -(-max(lengths, default=1) // _STEP) * _STEP)
    tried = [length for factor in _FACTORS if (length := shortest * factor) <= min(_LONGEST, most)]
    if not tried:
        return min(shortest, _LONGEST, most)
    return min(tried, key=lambda length: (int(best_fit(lengths, length).max(initial=-1)) + 1) * length)


def product_dtype(device: torch.device) -> torch.dtype:
    """Dtype of matrix products."""
    return torch.bfloat16 if is_fast(torch.bfloat16, device) else torch.float32


def learnt_parts(conversation: Conversation, tokenizer: Tokenizer, longest: int) -> list[tuple[str, bool]] | None:
    """A conversation's text, or that of its last turn where turns are examples by themselves, in parts that are learnt, or not.
    None where it does not fit into a row, or teaches nothing."""
    try:
        *_, encoded = encode_conversation(conversation, tokenizer)
    except (NothingLearntError, RowError):
        return None
    return text_parts(encoded, tokenizer) if encoded.inputs <= longest and encoded.is_learnt.any() else None


def _middle_left_out(text: str) -> str:
    half = _SHOWN // 2
    return text if len(text) <= _SHOWN else f"{text[:half]} … {text[-half:]}"


def _method(
    config: FinetuneConfig, base: BaseModel, tokens: int, device: torch.device
) -> tuple[tuple[Method, str], Mapping[Method, float], float]:
    """The way to tune and why, what each takes, and what can be used, in bytes. tokens: of a step."""
    dtype, kind, free = product_dtype(device), device.type, free_bytes(device)
    needs = memory_needs(base.config, config.rank, tokens, base.quantised, dtype=dtype, device=kind)
    if config.method == "auto":
        chosen = choose_method(base.config, config.rank, tokens, free, base.quantised, dtype=dtype, device=kind)
        return chosen, needs, free
    if config.method not in needs:
        raise ConfigError(f"--method: {config.method} is of whole weights, and {base.name} is quantised; take qlora")
    return (config.method, f"as asked; it takes about {size(needs[config.method])}"), needs, free


def _within(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, context: int, config: FinetuneConfig
) -> list[tuple[Conversation, EncodedExample]]:
    """The conversations that have something to learn within a row, each with its last example."""
    fitted, _ = fit_each(conversations, tokenizer, context, config.truncate)
    fitting = [(one, examples[-1]) for one, examples in zip(conversations, fitted, strict=True) if examples]
    if len(fitting) < _FEWEST:
        raise SourceError(
            f"{len(fitting):,} conversations held out have an answer within {context:,} tokens; raise --context-length"
        )
    return fitting
