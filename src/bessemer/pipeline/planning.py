"""Reads from a recipe or a preset what a plan is made for: the model, its training settings, and the number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bessemer.core.config import nearest
from bessemer.core.errors import ConfigError
from bessemer.core.stage import SomeConfig, last_of
from bessemer.core.yaml_file import parse_value
from bessemer.model.config import ModelConfig, ModelStageConfig, preset_config
from bessemer.model.presets import PRESET_VOCABULARIES, PRESETS
from bessemer.pipeline.recipe import Recipe, Stage, feeding, load_recipe, shipped_recipes
from bessemer.tokenization.config import TokenizeConfig
from bessemer.training.config import LoopConfig
from bessemer.training.pretrain_config import PretrainConfig

#: Tokens for each parameter by default: a compute-optimal run (Hoffmann et al. 2022, table 3).
TOKENS_PER_PARAMETER = 20
#: Tokens of an optimizer step where only a preset is given.
_TOKENS_PER_STEP = 1 << 19
#: Longest row where only a preset is given.
_LONGEST_ROW = 4096


@dataclass(frozen=True)
class TrainingPlan:
    """A model and how it is to be trained. tokens: of the whole run; None where the recipe gives minutes."""

    name: str
    model: ModelConfig
    settings: LoopConfig
    tokens: int | None
    minutes: float | None = None


def training_plan(name: str, overrides: Sequence[str] = (), *, allow_code: bool = False) -> TrainingPlan:
    """The training of the recipe or preset of this name, with overrides; a recipe comes first where both have the name.

    Raises ConfigError when there is neither, or when the recipe trains nothing.
    """
    if name.endswith((".yaml", ".yml")) or name in shipped_recipes():
        return _of_recipe(load_recipe(name, overrides, allow_code=allow_code))
    if name in PRESETS:
        return _of_preset(name, overrides)
    raise ConfigError(f"there is no recipe or preset {name!r}{nearest(name, [*shipped_recipes(), *PRESETS])}")


def _of_recipe(recipe: Recipe) -> TrainingPlan:
    trained = next((stage for stage in recipe.stages if isinstance(stage.config, LoopConfig)), None)
    settings = trained.config if trained is not None and isinstance(trained.config, LoopConfig) else None
    model = model_of(recipe.folder, recipe.stages if trained is None else feeding(recipe.stages, trained))
    if model is None or settings is None:
        raise ConfigError(f"the recipe {recipe.name!r} has no {'model' if model is None else 'stage that trains'} to plan")
    tokens, minutes = settings.steps and settings.tokens_before(settings.steps), None
    if isinstance(settings, PretrainConfig) and tokens is None:
        tokens, minutes = settings.tokens, settings.minutes
    return TrainingPlan(recipe.name, model, settings, tokens, minutes)


def model_of(folder: Path, stages: Sequence[Stage]) -> ModelConfig | None:
    """The decoder that the last model stage of these makes; None where there is none.

    Its vocabulary is that of the settings, or of the tokenizer named. Relative paths start from `folder`.
    """
    config = _last_config(stages, ModelStageConfig)
    if config is None:
        return None
    if config.init_from is not None:
        from bessemer.model.storage.model_config import read_model_config

        return read_model_config(folder / config.init_from).with_changes(**config.given)
    tokenize = _last_config(stages, TokenizeConfig)
    if tokenize is None:
        assert config.preset is not None
        return config.model_for(PRESET_VOCABULARIES[config.preset], None, None)
    return config.model_for(_vocabulary(tokenize, folder), None, None)


def _last_config(stages: Sequence[Stage], kind: type[SomeConfig]) -> SomeConfig | None:
    return last_of({stage.name: stage.config for stage in stages}, kind)


def _vocabulary(tokenize: TokenizeConfig, folder: Path) -> int:
    if tokenize.tokenizer is None:
        return tokenize.vocab_size
    from bessemer.tokenization.tokenizer import load_tokenizer

    return load_tokenizer(folder / tokenize.tokenizer).vocab_size


def _of_preset(name: str, overrides: Sequence[str]) -> TrainingPlan:
    """A preset's pretraining: half a million tokens a step and 20 tokens a parameter, unless overrides say otherwise."""
    model = preset_config(name, PRESET_VOCABULARIES[name])
    length = min(model.max_position_embeddings, _LONGEST_ROW)
    values = {"context_length": length, "batch_size": max(1, _TOKENS_PER_STEP // length)}
    changes: dict[str, dict[str, object]] = {"model": {}, "pretrain": {}}
    for text in overrides:
        key, equals, value = text.partition("=")
        section, _, field = key.partition(".")
        if not equals or section not in changes or not field:
            raise ConfigError(f"{text!r}: of a preset, an override is model.KEY=VALUE or pretrain.KEY=VALUE")
        container = changes[section]
        *outer, last = field.split(".")
        for part in outer:
            container = container.setdefault(part, {})  # type: ignore[assignment]
        container[last] = parse_value(value, f"override {text}")
    if changes["model"]:
        model = ModelStageConfig.parse({"preset": name} | changes["model"], "model").model_for(model.vocab_size, None, None)
    length_given = {"steps", "tokens", "minutes"} & changes["pretrain"].keys()
    if not length_given:
        values["tokens"] = TOKENS_PER_PARAMETER * model.active_parameters()
    settings = PretrainConfig.parse(values | changes["pretrain"], "pretrain")
    tokens = settings.tokens or (settings.steps and settings.tokens_before(settings.steps))
    return TrainingPlan(name, model, settings, tokens, settings.minutes)
