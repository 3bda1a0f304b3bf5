"""How an engine uses its machine."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from bessemer.core.config import Config, setting


class SpeculationConfig(Config):
    """Guessing tokens ahead, and checking all guesses in one step. What is made stays the same, only its pace changes."""

    method: Literal["ngram", "draft", "mtp"] = setting(
        "ngram",
        "who guesses: n-grams that occurred in the text before, a smaller model, the model's own multi-token heads",
        affects_output=False,
    )
    tokens: int = setting(8, "at most so many guesses a step; fewer where few come true", unit="tokens", ge=1, le=64)
    model: str | None = setting(None, "folder of the model that guesses, for `draft`")
    adapt: bool = setting(True, "guess more where guesses come true, less where they do not, and none where it does not pay")

    shorthand = "method"

    @model_validator(mode="after")
    def _has_a_model(self) -> Self:
        if (self.method == "draft") != (self.model is not None):
            raise ValueError("method draft and model go together: give the folder of the model that guesses")
        return self


class ParallelInferenceConfig(Config):
    """Over how many processes of this machine a model is shared. What it makes stays the same up to rounding."""

    tensor: int = setting(1, "processes that share every matrix, and the heads with their keys and values", ge=1)
    expert: int = setting(1, "processes that share the experts, each with a whole of the rest", ge=1)
    timeout: float = setting(
        600.0, "how long a process waits for the others within a step before it gives up", unit="seconds", gt=0
    )

    @property
    def processes(self) -> int:
        """All of them."""
        return self.tensor * self.expert


class EngineConfig(Config):
    """Memory, order and speed of an engine; what it makes depends on none of it beyond rounding."""

    max_model_len: int | None = setting(
        None,
        "most tokens of a prompt and its answer together, at most the model's context; less takes less memory for pages and "
        "tables of positions; none: the context",
        unit="tokens",
        ge=2,
    )
    block_size: int = setting(16, "positions of a page of keys and values", unit="tokens", ge=1, le=1024)
    kv_memory: float | None = setting(
        None,
        "memory for pages; none: a quarter of what is free, or less where all that may run at once needs less",
        unit="GiB",
        gt=0,
    )
    state_memory: float | None = setting(
        None,
        "of kv_memory, what is kept of linear attention's states, for the next text that begins alike; none: up to half",
        unit="GiB",
        ge=0,
    )
    kv_type: Literal["auto", "float32", "bfloat16", "float16", "int8"] = setting(
        "auto", "type of the pages; auto: the model's own, float16 for quantised models"
    )
    max_running: int = setting(64, "answers computed at once", ge=1)
    max_waiting: int | None = setting(None, "answers that may wait for a place; one more is refused; none: any number", ge=0)
    max_step_tokens: int = setting(
        512, "tokens of one step at most: prompts are read in pieces, so that answers under way go on", unit="tokens", ge=1
    )
    prefix_cache: bool = setting(True, "keep the pages of what was read, for the next text that begins alike")
    batch_invariant: bool = setting(False, "an answer's tokens never depend on what else is running, to the last bit")
    kernels: Literal["auto", "on", "off"] = setting(
        "auto", "compiled kernels: where they can be built, always, or never (then the modules run in PyTorch)"
    )
    attention: Literal["auto", "gather", "paged"] = setting(
        "auto",
        "how PyTorch reads pages: gathered into one tensor, or where they lie (FlexAttention); auto: gathered, until paged "
        "has been timed on a GPU",
    )
    cuda_graphs: bool = setting(True, "on a GPU, where pages are read where they lie: launch a step of one token each at once")
    threads: int | None = setting(
        None,
        "threads of the compiled kernels, none: measured at the start; with `parallel` of each process, none: its share",
        ge=1,
    )
    speculation: SpeculationConfig | None = setting(None, "guess tokens ahead; none: one token a step")
    parallel: ParallelInferenceConfig | None = setting(None, "share a model's folder between processes; none: one process")

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.processes > 1 and self.kernels == "on":
            raise ValueError("kernels: on and parallel do not go together: the compiled kernels compute whole models")
        if self.processes > 1 and self.attention == "paged":
            raise ValueError("attention: paged and parallel do not go together: processes that share a model gather its pages")
        if self.processes > 1 and self.speculation is not None and self.speculation.method == "mtp":
            raise ValueError("speculation by mtp and parallel do not go together; guess by ngram or draft")
        return self

    @property
    def processes(self) -> int:
        """Those that share the model, this one among them."""
        return self.parallel.processes if self.parallel else 1
