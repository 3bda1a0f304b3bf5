"""Settings of the stages that tune a trained model, whole or by an adapter. Imports no PyTorch."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import field_validator, model_validator

from bessemer.core.config import setting
from bessemer.training.config import LoopConfig
from bessemer.training.config_parts import AdapterConfig, KeepBetterConfig

#: Peak learning rate of an adapter: about ten times that of full tuning, whatever the rank (Schulman et al. 2025, "LoRA
#: without regret").
ADAPTER_LEARNING_RATE = 2e-4


#: Message where compiled kernels are asked to sample from a quantised model that is being trained.
KERNELS_OVER_CODES = (
    "cpu_kernels: on: over a quantised model the kernels round activations to 8 bits, and log-probabilities would not be the "
    "trainer's; leave it out"
)


class TuningConfig(LoopConfig):
    """Settings of the stages that tune a trained model: whole, or by an adapter."""

    #: Whether modules may be trained whole beside an adapter: where no other model is the one without its adapter.
    trains_modules: ClassVar[bool] = False
    #: Default peak learning rate of an adapter.
    adapter_learning_rate: ClassVar[float] = ADAPTER_LEARNING_RATE

    adapter: AdapterConfig | None = setting(
        None,
        "Train a low-rank adapter and leave the weights as they are (docs/adapters.md), with AdamW at 2e-4 where nothing else "
        "is said, in reward at 1e-4, in rl at 1e-5. Absent: all weights.",
    )

    keep_better: KeepBetterConfig | None = setting(
        None,
        "Compare the trained model with the one that the stage started from, and end with that one where the trained one is "
        "worse (docs/trainer.md#the-better-of-two-models): true, tasks, or settings. Not of reward; in one process. Absent: "
        "the trained model.",
    )

    minutes: float | None = setting(
        None,
        "Most time that training may take, start-up and validation included: where a measurement at the start says that the "
        "steps do not fit, as many as fit are made, with a schedule of that length. Absent: all steps.",
        unit="minutes",
        gt=0,
    )

    @property
    def time_limit(self) -> float | None:
        """Minutes that the run may take at most."""
        return self.minutes

    @model_validator(mode="before")
    @classmethod
    def _suit_adapter(cls, values: Any) -> Any:
        """Optimizer and learning rate of an adapter, where they are not given."""
        if not isinstance(values, dict) or values.get("adapter") is None:
            return values
        values = {"optimizer": "adamw", "learning_rate": cls.adapter_learning_rate, **values}
        if not isinstance(values["adapter"], (dict, AdapterConfig)):
            values["adapter"] = {AdapterConfig.shorthand: values["adapter"]}
        return values

    @field_validator("keep_better", mode="before")
    @classmethod
    def _named_tasks(cls, value: Any) -> Any:
        if isinstance(value, bool):
            return {} if value else None
        if isinstance(value, str):
            value = [value]
        return {KeepBetterConfig.shorthand: value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check_adapter(self) -> Self:
        if self.adapter is None:
            return self
        if self.adapter.modules_to_save and not self.trains_modules:
            raise ValueError(
                "adapter.modules_to_save: in sft alone; elsewhere the model without its adapter is the reference, or it is "
                "sampled from with its updates"
            )
        if self.float8:
            raise ValueError("float8: of weights that are trained, and an adapter leaves them as they are")
        parallel = self.parallel
        split = next((axis for axis in ("context", "tensor", "pipeline", "expert") if getattr(parallel, axis) > 1), None)
        if split is not None:
            raise ValueError(f"parallel.{split}: an adapter is trained under data_replicate and data_shard alone")
        return self

    def check_sampled_adapter(self, cpu_kernels: str) -> None:
        """Raise ValueError for an adapter that cannot be sampled from while it is trained. cpu_kernels: of the engine that
        samples."""
        if self.adapter is None:
            return
        if self.adapter.dropout:
            raise ValueError(
                "adapter.dropout: the model samples without it, so the trainer's log-probabilities would be of another model; "
                "leave it out"
            )
        if self.adapter.quantize is not None and cpu_kernels == "on":
            raise ValueError(KERNELS_OVER_CODES)

    @property
    def low_rank(self) -> AdapterConfig | None:
        """The adapter that is trained."""
        return self.adapter

    @property
    def comparison(self) -> KeepBetterConfig | None:
        """How the trained model is compared with the one before."""
        return self.keep_better

    def output_settings(self) -> dict[str, Any]:
        """As of `Config`, without a comparison where there is none, so that the keys of such runs stay as they were."""
        kept = super().output_settings()
        if self.keep_better is None:
            del kept["keep_better"]
        return kept
