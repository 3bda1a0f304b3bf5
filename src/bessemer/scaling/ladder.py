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
#: Channels of a head.
_HEAD = 64
#: Width from which it is a multiple of four heads, and the embedding and the head are two.
_WIDE = 1024
#: Layers that are tried.
_LAYERS = range(2, 161)


@dataclass(frozen=True)
class LadderSettings:
    """Batch and warm-up in tokens, the peak learning rate, Adam's β₂."""

    batch_tokens: float
    learning_rate: float
    beta2: float
    warmup_tokens: float


def ladder_settings(parameters: float) -> LadderSettings:
    """The settings of a model by its number of parameters, without embeddings.

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

    Hidden width within a quarter of 64 times the layers, heads of 64 channels of which up to four share a key-value head,
    embedding and head tied below a width of 1,024. Raises ConfigError when nothing is near, as when the vocabulary alone is
    larger than the wanted model.
    """

    def distance(shape: tuple[int, int]) -> float:
        width, layers = shape
        outside = 0 if count == "non-embedding" else vocab_size * width * (1 if width < _WIDE else 2)
        return abs(layers * _block_parameters(width) + outside - parameters)

    shapes = [(width, layers) for layers in _LAYERS for width in _widths(layers)]
    model = _model(*min(shapes, key=distance), vocab_size, context_length)
    if not 0.7 < counted(model, count) / parameters < 1.4:
        raise ConfigError(
            f"no shape of a vocabulary of {vocab_size:,} has about {parameters:.3g} parameters: the nearest has "
            f"{counted(model, count):,}; another vocabulary or another budget would"
        )
    return model


def _widths(layers: int) -> list[int]:
    """Hidden widths near the aspect ratio."""
    target = _ASPECT_RATIO * layers
    multiples = range(_HEAD, target + target // 4 + 1, _HEAD)
    near = [width for width in multiples if 4 * abs(width - target) <= target]
    return [width for width in near if width < _WIDE or width % (4 * _HEAD) == 0]


def _key_value_heads(heads: int) -> int:
    return heads // next(group for group in (4, 3, 2, 1) if heads % group == 0)


def _inner(width: int) -> int:
    return round(_GATED_RATIO * width / _HEAD) * _HEAD


def _block_parameters(width: int) -> int:
    """Weights of the matrices of a block."""
    return 2 * width * (width + _key_value_heads(width // _HEAD) * _HEAD) + 3 * width * _inner(width)


def _model(width: int, layers: int, vocab_size: int, context_length: int) -> ModelConfig:
    heads = width // _HEAD
    settings = ModelStageConfig(
        preset=None,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=_key_value_heads(heads),
        head_dim=_HEAD,
        intermediate_size=_inner(width),
        max_position_embeddings=context_length,
        tie_word_embeddings=width < _WIDE,
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
