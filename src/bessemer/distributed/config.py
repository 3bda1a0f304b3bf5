"""Settings of the parallel layout: the number of processes of each axis."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from bessemer.core.config import Config, setting

#: Default number of stages per rank of each schedule.
_STAGES = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zero_bubble": 2, "zbv": 2}


class ParallelConfig(Config):
    """Sizes of the parallel axes. Their product is the number of processes. They change results only by rounding, so a run can
    continue under another layout."""

    data_replicate: int = setting(
        1, "Data parallelism: replicas of the model, each with its own rows; with data_shard above 1, hybrid.", gt=0
    )
    data_shard: Literal["auto"] | int = setting(
        "auto",
        "FSDP2: ranks over which weights, gradients and optimizer states are sharded, each with its own rows. auto: all "
        "remaining ranks.",
    )
    context: int = setting(1, "Context parallelism: ranks over which the tokens of a row are sharded.", gt=0)
    tensor: int = setting(
        1,
        "Tensor parallelism: ranks over which every matrix is sharded, and between matrices the tokens (sequence parallel).",
        gt=0,
    )
    pipeline: int = setting(1, "Pipeline parallelism: ranks that hold consecutive layers.", gt=0)
    expert: int = setting(
        1, "Expert parallelism: ranks over which the experts are sharded; a divisor of data_shard × context.", gt=0
    )
    pipeline_schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv"] = setting(
        "1f1b",
        "Order of forward and backward passes: gpipe (Huang et al. 2019), 1f1b (Narayanan et al. 2019), interleaved "
        "(Narayanan et al. 2021, several stages per rank), zero_bubble and zbv (Qi et al. 2023, 2024).",
    )
    stages_per_rank: Literal["auto"] | int = setting(
        "auto",
        "Stages per rank of the pipeline axis: more make the bubble shorter and add messages. auto: 2 for interleaved, "
        "zero_bubble and zbv, else 1.",
    )
    context_method: Literal["all_gather", "ring"] = setting(
        "all_gather", "How ranks of the context axis exchange keys and values: all-gathered at once, or passed around a ring."
    )
    timeout: float = setting(
        600.0,
        "Timeout of a collective: a process that waits longer for the others ends with an error.",
        unit="seconds",
        gt=0,
    )

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        fixed = _STAGES[self.pipeline_schedule]
        if self.stages_per_rank != "auto" and self.stages_per_rank < 1:
            raise ValueError("stages_per_rank must be at least 1, or auto")
        if self.pipeline_schedule in ("gpipe", "1f1b", "zbv") and self.stages_of_rank != fixed:
            raise ValueError(
                f"stages_per_rank {self.stages_per_rank}: a rank of {self.pipeline_schedule} holds {fixed}; interleaved and "
                "zero_bubble take other numbers"
            )
        return self

    @property
    def stages_of_rank(self) -> int:
        """Stages per rank of the pipeline axis."""
        return _STAGES[self.pipeline_schedule] if self.stages_per_rank == "auto" else self.stages_per_rank

    @property
    def splits_backward(self) -> bool:
        """Whether weight gradients are computed separately from those of the hidden states."""
        return self.pipeline > 1 and self.pipeline_schedule in ("zero_bubble", "zbv")
