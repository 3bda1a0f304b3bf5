"""The stage `pretrain`: trains a model on token shards by next-token prediction."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bessemer.core.metrics import MetricsLog
from bessemer.core.progress import Progress, Silent
from bessemer.core.seeds import derive_seed
from bessemer.core.usercode import load_user_function
from bessemer.data.corpus.reader import VALIDATION
from bessemer.model.decoder import Decoder
from bessemer.model.folder import load_model
from bessemer.tokenization.shards import TokenShards
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.training.autotune import prepare_run
from bessemer.training.checkpoint.export import save_trained
from bessemer.training.checkpoint.load import find_checkpoint
from bessemer.training.config import VALIDATIONS, PretrainConfig
from bessemer.training.data.pretraining import SCRATCH, PretrainingData
from bessemer.training.monitoring.peak_flops import device_peak
from bessemer.training.monitoring.throughput_check import ThroughputCheck
from bessemer.training.optim.lr_schedule import evenly_spaced, log_spaced
from bessemer.training.optim.mup import scale_initial_weights, width_ratio
from bessemer.training.runtime import Runtime
from bessemer.training.train_step import TrainStep
from bessemer.training.trainer import train
from bessemer.training.validation import bits_per_byte

#: Continues prompts with a model during training: (model, folder of its tokenizer, prompts) → continuations.
Sample = Callable[[Decoder, Path, list[str]], list[str]]

SAMPLES = "samples.jsonl"


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
    measured_tokens_per_second: float | None = None,
) -> dict[str, Any]:
    """Train the model of folder `model` on `tokens/train`, validating on `tokens/validation`; resumes from `out`.

    The last steps read `tokens/anneal`, where it exists. Writes below `out`: `model/` and what `save_trained` puts beside it,
    `metrics.jsonl`, `samples.jsonl`, `autotune.json`, `checkpoints/`. A user's own loss and optimizer, and a checkpoint to
    start from, lie below `folder`. Returns the headline metrics. Raises ArtefactError when the tokens were encoded with
    another tokenizer than the model's or are too few, and what `train` raises.

    measured_tokens_per_second: the throughput from which `config.steps` was just computed. Raises StaleMeasurementError when
    the first steps contradict it.
    """
    progress = progress or Silent()
    tokenizer = load_tokenizer(model)
    data = PretrainingData(config, tokens, tokenizer)
    validation = TokenShards(tokens / VALIDATION)
    validation.check_tokenizer(tokenizer.hash, "the model")
    config, runtime, mesh = prepare_run(config, model, out, device=device, progress=progress, folder=folder)
    assert config.steps is not None
    batches, data_summary = data.batches(config.steps, derive_seed(seed, "batches"), out / SCRATCH)
    decoder = load_model(model, device=runtime.device, dtype=torch.float32)
    if config.mup_base_width is not None:
        new = scale_initial_weights(decoder, width_ratio(config, decoder.config))
        scaled = "initial weights and learning rates" if new else "the model is not new: only learning rates"
        if mesh.leads:
            progress.say(
                f"  {scaled} scaled by muP from a width of {config.mup_base_width:,} to {decoder.config.hidden_size:,}"
            )
    throughput_check = None
    if measured_tokens_per_second is not None and mesh.alone:
        throughput_check = ThroughputCheck(config.batch_size * config.context_length / measured_tokens_per_second, config.steps)
    summary = train(
        decoder,
        batches,
        config,
        out,
        runtime=runtime,
        seed=seed,
        objective=None if config.loss is None else load_user_function(config.loss, folder),
        on_step_end=_PeriodicEvaluation(
            config, decoder, runtime, validation, model, out / SAMPLES, sample if mesh.alone else None
        ),
        progress=progress,
        description="pretrain",
        mesh=mesh,
        checkpoint_source=None if config.init_from is None else find_checkpoint(config.init_from, folder),
        folder=folder,
        peak_flops=device_peak(out, runtime, card_flops) if mesh.leads else None,
        throughput_check=throughput_check,
    )
    save_trained(decoder, out, tokenizer=model, mesh=mesh, config=config)
    return {
        "parameters": decoder.config.parameters(),
        **data_summary,
        **summary,
    }


class _PeriodicEvaluation:
    """Validates and samples at the steps that the settings name."""

    def __init__(
        self,
        config: PretrainConfig,
        decoder: Decoder,
        runtime: Runtime,
        validation: TokenShards,
        tokenizer: Path,
        samples: Path,
        sample: Sample | None,
    ) -> None:
        self._config = config
        self._decoder = decoder
        self._runtime = runtime
        self._validation = validation
        self._tokenizer = tokenizer
        self._samples = samples
        self._sample = sample
        steps = config.steps
        assert steps is not None
        every = config.evaluate_every
        self._validated_steps = frozenset([*range(every, steps, every), steps]) if every else evenly_spaced(steps, VALIDATIONS)
        self._sampled_steps = log_spaced(steps, config.sample_points) if sample and config.sample_prompts else frozenset()

    def __call__(self, finished: int, step: TrainStep) -> dict[str, float]:
        """Validation metrics after `finished` steps; empty at most steps."""
        if finished in self._sampled_steps:
            self._write_samples(finished)
        if finished not in self._validated_steps:
            return {}
        metrics = self._validate(step)
        if finished == self._config.steps and step.average is not None:
            with step.averaged():
                metrics |= {f"ema_{name}": value for name, value in self._validate(step).items()}
        return metrics

    def _validate(self, step: TrainStep) -> dict[str, float]:
        with self._runtime.evaluating(self._decoder):
            score = bits_per_byte(
                self._decoder,
                self._validation,
                context_length=self._config.context_length,
                batch_size=self._config.batch_size,
                max_tokens=self._config.evaluate_tokens,
                device=self._runtime.device,
                likelihood=step.negative_log_likelihood,
            )
        return {"bits_per_byte": score.bits_per_byte, "validation_loss": score.loss}

    def _write_samples(self, finished: int) -> None:
        assert self._sample is not None
        prompts = self._config.sample_prompts
        with self._runtime.evaluating(self._decoder):
            texts = self._sample(self._decoder, self._tokenizer, prompts)
        with MetricsLog(self._samples, resume_at=finished - 1) as samples:
            for prompt, text in zip(prompts, texts, strict=True):
                samples.write(finished, prompt=prompt, text=text)
