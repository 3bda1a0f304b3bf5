"""Settings of a decoder, and a recipe's `model:` section."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import model_validator

from bessemer.core.config import nearest, setting
from bessemer.model import costs
from bessemer.model.architecture import Architecture, DecoderShape
from bessemer.model.presets import PRESETS

#: Raised whenever the weights or the folder that the stage `model` makes of the same settings change.
MODEL_VERSION = 2


class ModelConfig(DecoderShape):
    """A decoder: its architecture and its vocabulary, and what follows from them (`costs`)."""

    def parameters(self) -> int:
        """All weights, each stored number once."""
        return costs.parameters(self)

    def active_parameters(self) -> int:
        """Weights that one token meets: all but the experts that it does not visit."""
        return costs.active_parameters(self)

    def embedding_parameters(self) -> int:
        """Weights of the embedding table, and of the head when it has its own."""
        return costs.embedding_parameters(self)

    def flops_per_token(self, context_length: int) -> int:
        """Floating-point operations of one training token at this context length (`costs.flops_per_token`)."""
        return costs.flops_per_token(self, context_length)

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Bytes that one token of context occupies in the cache."""
        return costs.kv_bytes_per_token(self, bytes_per_value)


class ModelStageConfig(Architecture):
    """A recipe's `model:` section: a preset, and any setting that replaces the preset's; or a model to start from.

    The vocabulary is not set here: it is the tokenizer's.
    """

    shorthand: ClassVar[str | None] = "preset"
    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (("preset", "init_from"),)

    preset: str | None = setting("qwen3-1m", "named size to start from; none: the defaults shown here")
    init_from: str | None = setting(
        None,
        "folder of a model whose weights and settings to start with, instead of new ones; only settings of positions may "
        "differ (its files, not its place, enter the stage's key)",
        affects_output=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if values.get("init_from") is not None:
            if values.get("preset") is not None:
                raise ValueError("init_from takes the shape of the model in that folder: leave preset out, or null")
            return values | {"preset": None}
        preset = values.get("preset", cls.model_fields["preset"].default)
        if preset is None:
            return values
        if preset not in PRESETS:
            raise ValueError(f"there is no preset {preset!r}{nearest(str(preset), list(PRESETS))}")
        return PRESETS[preset] | values

    @property
    def given(self) -> dict[str, Any]:
        """The settings that were given, as plain values: with `init_from`, all others are the model's own."""
        return self.model_dump(mode="json", include=self.model_fields_set - {"preset", "init_from"})

    def model_for(self, vocab_size: int, bos_token_id: int | None, eos_token_id: int | None) -> ModelConfig:
        """The decoder of this shape for a tokenizer of `vocab_size` tokens."""
        shape = self.model_dump(exclude={"preset", "init_from"})
        return ModelConfig(**shape, vocab_size=vocab_size, bos_token_id=bos_token_id, eos_token_id=eos_token_id)


def preset_config(name: str, vocab_size: int) -> ModelConfig:
    """The decoder of a preset with a vocabulary of `vocab_size` tokens. Raises ConfigError when there is no such preset."""
    return ModelStageConfig.parse({"preset": name}, "model").model_for(vocab_size, None, None)
