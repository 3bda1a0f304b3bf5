"""How a model of N parameters is trained, from its size alone: the rules of OLMo-core's ladder, for warm-up, stable, decay.

They are the published constants, with N without embeddings, and were tuned for AdamW at Chinchilla's 20 tokens a parameter and
more; a sweep of the learning rate at the smallest size says whether they hold elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from bessemer.core.errors import ConfigError
from bessemer.model.config import ModelConfig, ModelStageConfig

#: Size at which batch and learning rate were tuned.
_REFERENCE = 108e6
_REFERENCE_BATCH, _REFERENCE_LEARNING_RATE = 2048 * 160, 0.0047
#: Tokens of a batch from which Adam's second moment forgets faster.
_LARGE_BATCH = 524_288
#: Share of the run in which the learning rate falls to zero.
DECAY_FRACTION = 0.1
#: Hidden width over layers, and inner width of a gated feed-forward over hidden, of the models made here.
_ASPECT_RATIO, _GATED_RATIO = 64, 8 / 3
_WIDTH_STEP, _HEAD = 64, 64
#: Width from which it is a multiple of four heads, which then share a key-value head.
_GROUPED = 512


@dataclass(frozen=True)
class LadderSettings:
    """Batch and warm-up in tokens, the peak learning rate, Adam's β₂."""

    batch_tokens: float
    learning_rate: float
    beta2: float
    warmup_tokens: float


def ladder_settings(parameters: float) -> LadderSettings:
    """The settings of a model of so many parameters, without embeddings.

    Batch 2048 · 160 · (N / 108e6)^(2/3) tokens, learning rate 0.0047 · (N / 108e6)^(−1/3) / 2, β₂ 0.95 from 524,288 tokens a
    batch on and 0.99 below, a warm-up of N tokens.
    """
    size = parameters / _REFERENCE
    batch = _REFERENCE_BATCH * size ** (2 / 3)
    rate = _REFERENCE_LEARNING_RATE * size ** (-1 / 3) / 2
    return LadderSettings(batch, rate, 0.95 if batch >= _LARGE_BATCH else 0.99, parameters)


def counted(model: ModelConfig, count: str) -> int:
    """N of a model: the weights that a token meets, and with `non-embedding` without the embedding and the head."""
    return model.active_parameters() - (model.embedding_parameters() if count == "non-embedding" else 0)


def shape_for(parameters: float, *, vocab_size: int, context_length: int, count: str = "all") -> ModelConfig:
    """A dense Qwen3 whose N, counted so, is nearest to the wanted one.

    Hidden width within a quarter of 64 times the layers, heads of 64 channels, from a width of 512 on a key-value head for
    every four of them, embedding and head tied below a width of 1,024. Raises ConfigError when nothing is near, as when the
    vocabulary alone is larger than the wanted model.
    """
    best: ModelConfig | None = None
    for layers in range(2, 161):
        for width in _widths(layers):
            model = _shape(width, layers, vocab_size, context_length)
            if best is None or _distance(model, parameters, count) < _distance(best, parameters, count):
                best = model
    assert best is not None
    if not 0.7 < counted(best, count) / parameters < 1.4:
        raise ConfigError(
            f"no shape of a vocabulary of {vocab_size:,} has about {parameters:.3g} parameters: the nearest has "
            f"{counted(best, count):,}; another vocabulary or another budget would"
        )
    return best


def _widths(layers: int) -> list[int]:
    """Hidden widths near the aspect ratio."""
    target = _ASPECT_RATIO * layers
    multiples = range(_WIDTH_STEP, target + target // 4 + 1, _WIDTH_STEP)
    near = [width for width in multiples if 4 * abs(width - target) <= target]
    return [width for width in near if width < _GROUPED or width % (4 * _HEAD) == 0]


def _distance(model: ModelConfig, parameters: float, count: str) -> float:
    return abs(counted(model, count) - parameters)


def _shape(width: int, layers: int, vocab_size: int, context_length: int) -> ModelConfig:
    heads = width // _HEAD
    settings = ModelStageConfig(
        preset=None,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4 if width >= _GROUPED else heads,
        head_dim=_HEAD,
        intermediate_size=round(_GATED_RATIO * width / _WIDTH_STEP) * _WIDTH_STEP,
        max_position_embeddings=context_length,
        tie_word_embeddings=width < 1024,
    )
    return settings.model_for(vocab_size, None, None)


def shape_settings(model: ModelConfig) -> dict[str, int | bool | None]:
    """The `model:` section of a recipe that makes a model of `shape_for`."""
    names = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "max_position_embeddings",
        "tie_word_embeddings",
    )
    return {"preset": None, **{name: getattr(model, name) for name in names}}
