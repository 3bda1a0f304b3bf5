"""Settings of the stage `sft`, and of `bessemer finetune` with its defaults for a pretrained model. Imports no PyTorch."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import field_validator, model_validator

from bessemer.core.config import Config, nearest, setting
from bessemer.core.records import TABLES, is_text_file
from bessemer.core.usercode import is_user_function
from bessemer.posttraining.data.made import (
    CITED,
    DOCS_QUESTIONS,
    MADE_DATA,
    ON_BAD_ROW,
    PICTURES,
    PLACES,
    REVISIONS,
    SYNTHETIC,
    TASK,
    TRUNCATE,
    OnBadRow,
    Truncate,
    is_data_name,
)
from bessemer.training.adapter_config import TuningConfig

#: Raised when the same settings and inputs give other weights or conversations than before (golden outputs in the tests).
SFT_VERSION = 9

#: Default context length.
_LONGEST = 2048


class SFTConfig(TuningConfig):
    """The stage `sft`: supervised fine-tuning on conversations, with the loss on the assistant's messages. The defaults suit a
    real model that was pretrained elsewhere, as those of TRL, torchtune and LitGPT."""

    shorthand: ClassVar[str | None] = "data"
    trains_modules: ClassVar[bool] = True

    data: list[str] = setting(
        description=f"Conversations: {DOCS_QUESTIONS}; {REVISIONS}, {SYNTHETIC}, {CITED} and {PICTURES} of stages above; a "
        f"task whose right answers are known, as in {TASK}sums; {PLACES}: {{messages}}, {{prompt, completion}}, ShareGPT's "
        "{conversations}, Alpaca's {instruction, input, output}, or texts, which are learnt whole (docs/rows.md); or your own "
        "file.py:function that gives such rows.",
        default_factory=lambda: [DOCS_QUESTIONS],
        min_length=1,
        code=True,
    )
    weights: dict[str, float] = setting(
        default_factory=dict,
        description="How often the conversations of an entry of data come in a pass, by its name; 1 if not given. With a "
        "fraction, the same conversations come in every pass. Held-out conversations come once.",
    )
    prompt_column: str | None = setting(None, "Column of the questions, if its name is not recognised; needs answer_column.")
    answer_column: str | None = setting(None, "Column of the answers.")
    train_questions: int = setting(600, f"Questions of {DOCS_QUESTIONS} to train on.", gt=0)
    validation_questions: int = setting(
        200, f"Questions of {DOCS_QUESTIONS} about held-out documents, which are not trained on.", ge=0
    )
    task_items: int = setting(600, "Items of a task to train on, the first ones; none of them is held out.", gt=0)
    validation_share: float = setting(0.05, "Fraction of a file's conversations that is held out.", ge=0, lt=1)
    truncate: Truncate = setting("drop", TRUNCATE)
    on_bad_row: OnBadRow = setting("skip", ON_BAD_ROW)
    epochs: float = setting(3.0, "Passes over the conversations; without effect when steps is given.", gt=0)

    pretraining_share: float = setting(
        0.0,
        "Share of the rows that are plain text of the run's token shards, learnt whole, so that the model does not forget its "
        "pretraining; an epoch has accordingly more steps.",
        ge=0,
        lt=1,
    )
    loss: Literal["cross_entropy", "dft"] = setting(
        "cross_entropy",
        "dft: each token's cross-entropy times its probability, so that tokens that the model finds unlikely count less (Wu "
        "et al. "
        "2025, arXiv 2508.05629).",
    )
    neftune_alpha: float | None = setting(
        None,
        "Noise on the embeddings in training, uniform within ± alpha / √(tokens × channels of a row) (Jain et al. 2023, "
        "NEFTune: 5); in one process. Absent: none.",
        gt=0,
    )

    optimizer: str = setting("adamw", "As in pretrain.", code=True)
    learning_rate: float = setting(2e-5, "Peak learning rate.", gt=0)
    context_length: int = setting(
        _LONGEST, f"Tokens of a row; if not given, the model's context, at most {_LONGEST:,}.", unit="tokens", gt=0
    )
    warmup_fraction: float | None = setting(
        0.05, "Fraction of the steps in which the learning rate rises from zero.", ge=0, le=1
    )
    decay_fraction: float | None = setting(
        0.5, "wsd: fraction of the steps, at the end, in which the learning rate falls to zero.", ge=0, le=1
    )

    def fitted_to(self, longest: int) -> Self:
        """These settings with rows no longer than a model's context, unless their length is given."""
        if self.has_given_length or self.context_length <= longest:
            return self
        return self.with_changes(context_length=longest)

    @property
    def has_given_length(self) -> bool:
        """Whether the length of rows is given."""
        return "context_length" in self.model_fields_set

    @property
    def packed(self) -> bool:
        """Whether rows hold several conversations that do not attend to each other."""
        return True

    @field_validator("data")
    @classmethod
    def _known_data(cls, names: list[str]) -> list[str]:
        for name in names:
            is_known = name in MADE_DATA or name.startswith(TASK) or is_data_name(name) or is_text_file(name)
            if not is_known and not is_user_function(name):
                known = nearest(name, list(MADE_DATA))
                raise ValueError(
                    f"{name!r} is neither a file of rows ({', '.join(TABLES)}), a folder/ or hub:ORGANISATION/NAME, nor made "
                    f"data, nor a file.py:function{known}"
                )
        return names

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        for name, weight in self.weights.items():
            # a recipe may inherit weights for data that it does not use
            if name not in self.data and name not in MADE_DATA and not name.startswith(TASK):
                raise ValueError(f"weights: {name!r} is not in data{nearest(name, self.data)}")
            if not 0 < weight <= 1000:
                raise ValueError(f"weights: {name!r} must come more often than never, and at most 1,000 times, not {weight:g}")
        return self

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        if (self.prompt_column is None) != (self.answer_column is None):
            raise ValueError("prompt_column and answer_column go together")
        return self

    @model_validator(mode="after")
    def _check_loss(self) -> Self:
        if self.loss == "dft" and self.z_loss:
            raise ValueError("z_loss: beside cross_entropy, not beside dft")
        return self

    @property
    def columns(self) -> tuple[str, str] | None:
        """The columns of questions and of answers, where they are named."""
        if self.prompt_column is None or self.answer_column is None:
            return None
        return self.prompt_column, self.answer_column


#: Ways to tune, from the one that needs most memory to the one that needs least.
Method = Literal["full", "lora", "qlora"]
#: Peak learning rate of a real model whose weights are all tuned.
FULL_LEARNING_RATE = 1e-5


#: Default general tasks, whose data come with the package.
GENERAL_TASKS = ("general_knowledge", "general_texts")
#: Most items of each general task, which bounds the time.
GENERAL_LIMIT = 100


class FinetuneConfig(Config):
    """How a model is fine-tuned on questions and answers."""

    method: Literal["auto", "full", "lora", "qlora"] = setting(
        "auto",
        "full: all weights; lora: a low-rank adapter; qlora: an adapter of a model with weights of 4 bits; auto: the first of "
        "these that fits into memory.",
    )
    also: dict[str, float] = setting(
        default_factory=dict, description="Further files of questions and answers, and how often each comes in a pass."
    )
    prompt_column: str | None = setting(None, "Column of the questions; absent: found by its name.")
    answer_column: str | None = setting(None, "Column of the answers; absent: found by its name.")
    epochs: float = setting(2.0, "Passes over the data.", gt=0)
    learning_rate: float | None = setting(None, "Peak learning rate; absent: 1e-5 for full, 2e-4 for an adapter.", gt=0)
    base_dtype: Literal["auto", "float32", "bf16", "int8", "int4", "nf4"] = setting(
        "auto",
        "Type of the frozen weights under an adapter: float32 or bf16, which is then also the type of matmuls, or int8, int4 "
        "or nf4 (qlora); auto: the type that this machine multiplies fast, for qlora int4.",
    )
    rank: int = setting(16, "Rank of an adapter.", gt=0)
    alpha: float | None = setting(None, "Updates are scaled by alpha / rank; absent: twice the rank.", gt=0)
    dropout: float = setting(0.0, "Dropout of the adapter's inputs.", ge=0, lt=1)
    rslora: bool = setting(False, "Scale by alpha / √rank instead (Kalajdzievski 2023).")
    dora: bool = setting(False, "Also train the norms of the weights' rows (DoRA, Liu et al. 2024).")
    target_modules: list[str] = setting(
        default_factory=list,
        description="Linear layers that an adapter changes, by patterns of their names or of the last part; all-linear, or "
        "empty: all of attention, feed-forward and shared experts.",
    )
    modules_to_save: list[str] = setting(
        default_factory=list,
        description="Modules whose own weights are trained besides an adapter, by patterns: embed_tokens, lm_head, norm.",
    )
    context_length: int | None = setting(
        None, "Tokens of a row; absent: those of the longest conversation, at most 2,048 and the model's context.", gt=1
    )
    batch_size: int | None = setting(None, "Rows of a batch; absent: as many as hold eight conversations.", gt=0)
    tokens_per_batch: int | None = setting(
        None,
        "Most tokens of a micro-batch; absent: as many as fit into memory.",
        unit="tokens",
        affects_output=False,
        gt=0,
    )
    checkpointing: Literal["auto", "none", "full"] = setting(
        "auto",
        "Whether the backward pass recomputes whole blocks, which takes a third longer and much less memory; auto: if a step "
        "of one row does not fit into memory otherwise.",
        affects_output=False,
    )
    paged_optimizer: bool = setting(
        False,
        "Keep the optimizer's states outside the device's memory: in the host's memory for a card, in a mapped file for a "
        "processor.",
        affects_output=False,
    )
    price_per_hour: float | None = setting(
        None, "Price of the machine for an hour, in any currency: the plan says what the run costs.", affects_output=False, gt=0
    )
    truncate: Truncate = setting("drop", TRUNCATE)
    on_bad_row: OnBadRow = setting("skip", ON_BAD_ROW)
    held_out: float = setting(0.1, "Share of the data that is held out, to see whether the model got better.", gt=0, lt=1)
    general: list[str] = setting(
        default_factory=lambda: list(GENERAL_TASKS),
        description="General tasks that are answered by likelihood before and after, to measure what is forgotten; empty: "
        "none.",
    )
    general_limit: int = setting(GENERAL_LIMIT, "Items of each general task, the first ones.", unit="items", ge=2)
    track: list[Literal["tensorboard", "wandb", "trackio"]] = setting(
        description="Experiment trackers that also get the records of metrics.jsonl.",
        affects_output=False,
        default_factory=list,
    )
    merge: bool = setting(
        False,
        "Also write model/, the weights with the adapter merged; the same command with this option does it later too.",
        affects_output=False,
    )

    @property
    def codes(self) -> Literal["int8", "int4", "nf4"]:
        """The scheme of the frozen weights under `qlora`."""
        return self.base_dtype if self.base_dtype in ("int8", "int4", "nf4") else "int4"

    @model_validator(mode="after")
    def _check_base(self) -> Self:
        in_codes = self.base_dtype in ("int8", "int4", "nf4")
        if in_codes and self.method in ("full", "lora"):
            raise ValueError(f"base_dtype: {self.base_dtype} is of frozen weights in codes; take method qlora, or auto")
        if self.base_dtype in ("float32", "bf16") and self.method == "qlora":
            raise ValueError(f"base_dtype: {self.base_dtype} is no form of codes; qlora has int4, nf4 and int8")
        if self.method == "full":
            for name in ("alpha", "target_modules", "modules_to_save", "dora", "rslora", "dropout"):
                if getattr(self, name):
                    raise ValueError(f"{name}: of an adapter, and full trains all weights; leave one of them out")
        return self
