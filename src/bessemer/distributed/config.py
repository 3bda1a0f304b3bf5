"""Settings of the layout: over how many processes each axis of a training step is spread."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from bessemer.core.config import Config, setting

#: Stages that a rank of each schedule holds, where nothing else is asked for.
_STAGES = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zero_bubble": 2, "zbv": 2}


class ParallelConfig(Config):
    """How a step is spread over processes. Their product must be the number of processes; none changes what is computed, up
    to rounding, so the same run goes on under another layout."""

    data_replicate: int = setting(
        1, "Copies of the model that each see other rows (data parallel); with data_shard above 1, hybrid.", gt=0
    )
    data_shard: Literal["auto"] | int = setting(
        "auto", "Ranks that share one copy's weights, gradients and states and see other rows (FSDP2). auto: all that remain."
    )
    context: int = setting(1, "Ranks that share the tokens of a row.", gt=0)
    tensor: int = setting(1, "Ranks that share every matrix, and between matrices the tokens (sequence parallel).", gt=0)
    pipeline: int = setting(1, "Stages that hold consecutive layers.", gt=0)
    expert: int = setting(
        1, "Ranks that share the experts; taken out of data_shard × context, of which it must be a divisor.", gt=0
    )
    pipeline_schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv"] = setting(
        "1f1b",
        "Order of forward and backward passes: gpipe (Huang et al. 2019), 1f1b (Narayanan et al. 2019), interleaved "
        "(Narayanan et al. 2021, several stages a rank), zero_bubble and zbv (Qi et al. 2023, 2024).",
    )
    stages_per_rank: Literal["auto"] | int = setting(
        "auto",
        "Stages that each rank of the pipeline axis holds: more make the bubble shorter and the messages more. auto: 2 for the "
        "schedules that know what to do with them, else 1.",
    )
    context_method: Literal["all_gather", "ring"] = setting(
        "all_gather", "How ranks of the context axis see each other's keys: gathered at once, or passed round a ring."
    )
    timeout: float = setting(
        600.0,
        "How long a process waits for the others in one exchange before it gives up: a rank that hangs must not stop the "
        "others for good.",
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
        """Stages that each rank of the pipeline axis holds."""
        return _STAGES[self.pipeline_schedule] if self.stages_per_rank == "auto" else self.stages_per_rank

    @property
    def splits_backward(self) -> bool:
        """Whether the gradients of the weights are computed apart from those of the states."""
        return self.pipeline > 1 and self.pipeline_schedule in ("zero_bubble", "zbv")
