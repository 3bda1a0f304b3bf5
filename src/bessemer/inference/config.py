"""Settings of the inference engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from bessemer.core.config import Config, setting
from bessemer.inference.sampling.params import WatermarkConfig

#: Most that a setting of memory may say: a pebibyte.
_MOST_GIB = 1 << 20


class SpeculationConfig(Config):
    """Speculative decoding: draft tokens are proposed and verified in one step. The output distribution stays the same."""

    method: Literal["ngram", "draft", "mtp"] = setting(
        "ngram",
        "what proposes draft tokens: n-grams of the text so far, a smaller model, or the model's own multi-token heads",
        affects_output=False,
    )
    tokens: int = setting(8, "most draft tokens a step; fewer where few are accepted", unit="tokens", ge=1, le=64)
    model: str | None = setting(None, "folder of the draft model, for `draft`")
    adapt: bool = setting(True, "choose the draft length by the acceptance rate and the measured cost of a step")

    shorthand = "method"

    @model_validator(mode="after")
    def _has_a_model(self) -> Self:
        if (self.method == "draft") != (self.model is not None):
            raise ValueError("method draft and model go together: give the folder of the draft model")
        return self


class ParallelInferenceConfig(Config):
    """Processes of this machine that share a model. The output stays the same up to rounding."""

    tensor: int = setting(1, "processes that share every matrix, and the heads with their keys and values", ge=1)
    expert: int = setting(1, "processes that share the experts, each with a whole of the rest", ge=1)
    timeout: float = setting(
        600.0, "how long a process waits for the others within a step before it gives up", unit="seconds", gt=0
    )

    @property
    def processes(self) -> int:
        """Processes in all."""
        return self.tensor * self.expert


class EngineConfig(Config):
    """Memory, scheduling and speed of an engine. The output depends on none of it beyond rounding, but for a watermark."""

    retired: ClassVar[Mapping[str, str]] = {
        "max_running": "max_num_seqs",
        "max_step_tokens": "max_num_batched_tokens",
        "kv_type": "kv_cache_dtype",
        "kernels": "cpu_kernels",
        "attention": "paged_attention",
    }

    max_model_len: int | None = setting(
        None,
        "most tokens of a prompt and its completion together, at most the model's context; less takes less memory for KV "
        "blocks and tables of positions; none: the context",
        unit="tokens",
        ge=2,
    )
    context_overflow: Literal["refuse", "shift", "summarise", "retrieve"] = setting(
        "refuse",
        "a prompt that is longer than the context, and an answer that reaches its end: refused and ended; or (shift) the text "
        "loses half of what is behind its first tokens and goes on, and the model no longer sees what it lost; or, in a chat "
        "with a server, (summarise) summaries by the model take the place of earlier turns and of texts that are too long, or "
        "(retrieve) of the longest texts those passages stay that fit the question, and all else is refused",
    )
    context_keep: int = setting(
        256, "first tokens that a shift keeps, such as the instructions; at most half of the context", unit="tokens", ge=0
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto",
        "type of the weights that are no codes, and of activations; auto: the model's own, of float32 bfloat16 on a GPU that "
        "multiplies in it, and float32 on a processor that is slow in the model's",
    )
    block_size: int = setting(
        16,
        "positions of a KV block; where nothing is given, 256 on a GPU whose blocks FlashAttention reads",
        unit="tokens",
        ge=1,
        le=1024,
    )
    kv_memory: float | None = setting(
        None,
        "memory for the KV cache; none: a quarter of what is free, or less where all that may run at once needs less, and on a "
        "GPU what gpu_memory_utilization leaves",
        unit="GiB",
        gt=0,
        le=_MOST_GIB,
    )
    gpu_memory_utilization: float | None = setting(
        None,
        "share of a GPU's memory that weights, a step and the KV cache take together; none: 0.9 for a model that is opened "
        "from its folder or file, without a draft model; else the KV cache gets a quarter of what is free",
        gt=0,
        le=1,
    )
    state_memory: float | None = setting(
        None,
        "share of kv_memory for snapshots of linear attention's states, for prompts that share a prefix; none: up to half",
        unit="GiB",
        ge=0,
        le=_MOST_GIB,
    )
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16", "int8", "int4"] = setting(
        "auto",
        "type of the KV cache; auto: the model's own, float16 for quantised models; int8 and int4: with a scale for each token "
        "and head",
    )
    max_num_seqs: int = setting(64, "sequences computed at once", ge=1)
    max_waiting: int | None = setting(None, "requests that may wait; one more is refused; none: any number", ge=0)
    max_num_batched_tokens: int = setting(
        512,
        "most tokens of one step: prompts are read in chunks, so that running requests go on; where nothing is given, 8,192 on "
        "a GPU",
        unit="tokens",
        ge=1,
    )
    prefix_cache: bool = setting(True, "reuse cached KV blocks for prompts that share a prefix")
    prefix_store: str | None = setting(
        None,
        "folder for the KV blocks of prefixes that several requests had in common, such as an agent's instructions: found "
        "again after a restart; none: kept in memory alone",
    )
    prefix_store_size: float = setting(
        4.0,
        "most that a model's prefixes take of the disk; those used longest ago go first",
        unit="GiB",
        gt=0,
        le=_MOST_GIB,
    )
    mmproj: str | None = setting(
        None,
        "of a GGUF model: the file of its encoder of pictures (llama.cpp's `mmproj`); none: the one beside it, called "
        "mmproj-NAME.gguf or the only one there",
    )
    batch_invariant: bool = setting(False, "a request's tokens never depend on what else is running, to the last bit")
    cpu_kernels: Literal["auto", "on", "off"] = setting(
        "auto", "compiled CPU kernels: where they can be built, always, or never (then the modules run in PyTorch)"
    )
    activation_bits: Literal[8, 16] = setting(
        8,
        "bits to which the compiled CPU kernels round activations that meet quantised weights; 16: answers as of a product in "
        "floating point, for twice the arithmetic",
    )
    paged_attention: Literal["auto", "gather", "flash", "flashinfer", "flex"] = setting(
        "auto",
        "how PyTorch reads KV blocks: gathered into one tensor, or in place by FlashAttention, FlashInfer or FlexAttention; "
        "auto: on a GPU the first of these three that is installed and can, elsewhere gathered",
    )
    cuda_graphs: bool = setting(
        True, "on a GPU, with KV blocks read in place by flash or flex: launch a step of one token each at once"
    )
    async_scheduling: Literal["auto", "on", "off"] = setting(
        "auto",
        "sample on the device, and schedule the next step while it computes the current one; auto: on a GPU, without "
        "`batch_invariant`; never with speculation, `parallel` or linear attention",
    )
    threads: int | None = setting(
        None,
        "threads of the compiled CPU kernels, none: measured at the start; with `parallel` of each process, none: its share",
        ge=1,
    )
    watermark: WatermarkConfig | None = setting(
        None, "mark the answers of all requests that can carry it: beams cannot, nor gumbel's at temperature 0; none: no mark"
    )
    speculation: SpeculationConfig | None = setting(None, "speculative decoding; none: one token a step")
    parallel: ParallelInferenceConfig | None = setting(None, "share a model's folder between processes; none: one process")

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.processes > 1 and self.cpu_kernels == "on":
            raise ValueError("cpu_kernels: on and parallel do not go together: the compiled CPU kernels compute whole models")
        if self.activation_bits != 8 and (self.cpu_kernels == "off" or self.processes > 1):
            without = "cpu_kernels: off" if self.cpu_kernels == "off" else "parallel"
            raise ValueError(
                f"activation_bits: only the compiled CPU kernels round activations, not with {without}; leave it out"
            )
        if self.processes > 1 and self.speculation is not None and self.speculation.method == "mtp":
            raise ValueError("speculation by mtp and parallel do not go together; take ngram or draft")
        if self.prefix_store is not None and not self.prefix_cache:
            raise ValueError("prefix_store: what it finds goes through the prefix cache; leave prefix_cache: false out")
        if self.prefix_store is not None and self.processes > 1:
            raise ValueError("prefix_store and parallel do not go together: each process has a part of every block")
        return self

    @property
    def processes(self) -> int:
        """Processes that share the model, this one among them."""
        return self.parallel.processes if self.parallel else 1
