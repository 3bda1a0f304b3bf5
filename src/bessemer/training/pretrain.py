"""The stage `pretrain`: trains a model on token shards by next-token prediction."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from bessemer.core.metrics import MetricsLog
from bessemer.core.progress import Progress, Silent
from bessemer.core.seeds import derive_seed
from bessemer.core.stage import OpenTasks
from bessemer.core.usercode import load_user_function
from bessemer.data.corpus.reader import VALIDATION
from bessemer.distributed.mesh import Mesh
from bessemer.model.decoder import Decoder
from bessemer.tokenization.shards import TokenShards
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer
from bessemer.training.checkpoint.load import find_checkpoint
from bessemer.training.data.batches import BatchSource
from bessemer.training.data.pretraining import SCRATCH, PretrainingData
from bessemer.training.monitoring.throughput_check import ThroughputCheck
from bessemer.training.optim.lr_schedule import log_spaced, validated_steps
from bessemer.training.optim.mup import scale_initial_weights, width_ratio
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.run import OnStepEnd, run_training
from bessemer.training.trainer import Trainer
from bessemer.training.validation import bits_per_byte

#: Continues prompts with a model during training: (model, folder of its tokenizer, prompts) → continuations.
Sample = Callable[[Decoder, Path, list[str]], list[str]]

SAMPLES = "samples.jsonl"
#: Held-out texts that the model continues where no prompts are given, and the most tokens and characters that it is shown of
#: one.
_PROMPTS, _PROMPT_TOKENS, _PROMPT_CHARACTERS = 3, 48, 80


def pretrain(
    config: PretrainConfig,
    model: Path,
    tokens: Path,
    out: Path,
    *,
    seed: int,
    device: str = "auto",
    progress: Progress | None = None,
    sample: Sample | None = None,
    folder: Path = Path(),
    card_flops: Callable[[str], float | None] = lambda name: None,
    tasks: OpenTasks | None = None,
    measured_tokens_per_second: float | None = None,
) -> dict[str, Any]:
    """Train the model of folder `model` on `tokens/train`, validating on `tokens/validation`; resumes from `out`.

    The last steps read `tokens/anneal`, where it exists. Writes below `out`: `model/` and what `save_trained` puts beside it,
    `metrics.jsonl`, `samples.jsonl`, `autotune.json`, `checkpoints/`. A user's own loss and optimizer, and a checkpoint to
    start from, lie below `folder`. Returns the headline metrics. Raises ArtefactError when the tokens were encoded with
    another tokenizer than the model's or are too few, and what `train` raises.

    tasks: opens the tasks that the settings name. measured_tokens_per_second: the throughput from which `config.steps` was just
    computed. Raises StaleMeasurementError when the first steps contradict it.
    """
    progress = progress or Silent()
    tokenizer = load_tokenizer(model)
    data = PretrainingData(config, tokens, tokenizer)
    validation = TokenShards(tokens / VALIDATION)
    validation.check_tokenizer(tokenizer.hash, "the model")
    data_summary: dict[str, float] = {}
    held_out = [] if sample is None or config.sample_prompts is not None else held_out_prompts(validation, tokenizer)

    def batches(config: PretrainConfig, mesh: Mesh) -> BatchSource:
        assert config.steps is not None
        source, summary = data.batches(config.steps, derive_seed(seed, "batches"), out / SCRATCH)
        data_summary.update(summary)
        return source

    def initialise(config: PretrainConfig, decoder: Decoder, mesh: Mesh) -> None:
        if config.mup_base_width is not None:
            _scale_by_width(config, config.mup_base_width, decoder, mesh, progress if mesh.leads else Silent())

    def prepare(config: PretrainConfig, decoder: Decoder, mesh: Mesh) -> OnStepEnd:
        samples = sample if mesh.alone else None
        return _PeriodicEvaluation(config, decoder, validation, model, out / SAMPLES, samples, held_out)

    throughput_check = None
    if measured_tokens_per_second is not None and config.steps is not None and _alone():
        throughput_check = ThroughputCheck(config.batch_size * config.context_length / measured_tokens_per_second, config.steps)
    summary = run_training(
        config,
        model,
        out,
        batches,
        seed=seed,
        device=device,
        progress=progress,
        description="pretrain",
        folder=folder,
        card_flops=card_flops,
        prepare=prepare,
        tasks=tasks,
        initialise=initialise,
        objective=None if config.loss is None else load_user_function(config.loss, folder),
        checkpoint_source=None if config.init_from is None else find_checkpoint(config.init_from, folder),
        throughput_check=throughput_check,
    )
    # what is too little text for a new model need not be for one that goes on
    text = {"training_bytes": data.training_bytes} if config.init_from is None else {}
    return {"parameters": summary.pop("parameters"), **text, **data_summary, **summary}


def _alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


def _scale_by_width(config: PretrainConfig, base_width: int, decoder: Decoder, mesh: Mesh, progress: Progress) -> None:
    """Scale a new model's initial weights by muP, and say what is scaled."""
    new = scale_initial_weights(decoder, width_ratio(config, decoder.config), mesh)
    scaled = "initial weights and learning rates" if new else "the model is not new: only learning rates"
    progress.say(f"  {scaled} scaled by muP from a width of {base_width:,} to {decoder.config.hidden_size:,}")


class _PeriodicEvaluation:
    """Validates and samples at the steps that the settings name."""

    def __init__(
        self,
        config: PretrainConfig,
        decoder: Decoder,
        validation: TokenShards,
        tokenizer: Path,
        samples: Path,
        sample: Sample | None,
        held_out_prompts: list[str],
    ) -> None:
        self._config = config
        self._prompts = held_out_prompts if config.sample_prompts is None else config.sample_prompts
        self._decoder = decoder
        self._validation = validation
        self._tokenizer = tokenizer
        self._samples = samples
        self._sample = sample
        steps = config.steps
        assert steps is not None
        self._validated_steps = validated_steps(config)
        self._sampled_steps = log_spaced(steps, config.sample_points) if sample and self._prompts else frozenset()

    def __call__(self, finished: int, trainer: Trainer) -> dict[str, float]:
        """Validation metrics after `finished` steps; empty at most steps."""
        if finished in self._sampled_steps:
            self._write_samples(finished, trainer)
        if finished not in self._validated_steps:
            return {}
        metrics = self._validate(trainer)
        if finished == self._config.steps and trainer.average is not None:
            with trainer.averaged():
                metrics |= {f"ema_{name}": value for name, value in self._validate(trainer).items()}
        return metrics

    def _validate(self, trainer: Trainer) -> dict[str, float]:
        with trainer.runtime.evaluating(self._decoder):
            score = bits_per_byte(
                self._decoder,
                self._validation,
                context_length=self._config.context_length,
                batch_size=self._config.batch_size,
                max_tokens=self._config.evaluate_tokens,
                device=trainer.runtime.device,
                likelihood=trainer.negative_log_likelihood,
            )
        return {"bits_per_byte": score.bits_per_byte, "validation_loss": score.loss}

    def _write_samples(self, finished: int, trainer: Trainer) -> None:
        assert self._sample is not None
        with trainer.runtime.evaluating(self._decoder):
            texts = self._sample(self._decoder, self._tokenizer, self._prompts)
        held_out = {"held_out": True} if self._config.sample_prompts is None else {}
        with MetricsLog(self._samples, resume_at=finished - 1) as samples:
            for prompt, text in zip(self._prompts, texts, strict=True):
                samples.write(finished, prompt=prompt, text=text, **held_out)


def held_out_prompts(shards: TokenShards, tokenizer: Tokenizer) -> list[str]:
    """Beginnings of a few documents, spread over all, for a model to go on from; each ends with a word where words have
    spaces."""
    lengths = np.concatenate([np.empty(0, np.int64), *(part for part, _ in shards.lengths_and_sources())])
    starts = np.cumsum(lengths) - lengths
    # a document that is hardly longer than its prompt leaves nothing to go on with
    (long,) = np.nonzero(lengths > 2 * _PROMPT_TOKENS)
    among = long if len(long) else np.arange(len(lengths))
    chosen = among[np.linspace(0, len(among) - 1, min(_PROMPTS, len(among)), dtype=int)]
    texts = (
        tokenizer.decode(shards.read(int(starts[one]) + 1, min(_PROMPT_TOKENS, int(lengths[one]) - 1)).tolist())
        for one in chosen
    )
    return [prompt for text in texts if (prompt := _beginning(text))]


def _beginning(text: str) -> str:
    """The first characters of a text up to the end of a word; where no space is near, up to the limit."""
    text = text.lstrip()[: _PROMPT_CHARACTERS + 1].rstrip("\N{REPLACEMENT CHARACTER}")
    words = text.rsplit(maxsplit=1)
    if len(words) == 2 and len(words[0]) >= _PROMPT_CHARACTERS // 2:
        return text[: text.rindex(words[1])].rstrip()
    return text[:_PROMPT_CHARACTERS].rstrip()
