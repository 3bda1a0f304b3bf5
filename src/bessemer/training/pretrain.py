"""The stage `pretrain`: trains a model on token shards by next-token prediction.

Its data: rows of the token stream or packed documents, fill-in-the-middle, and the second mixture of the decay.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch.distributed as dist

from bessemer.core.config import nearest
from bessemer.core.errors import ConfigError
from bessemer.core.hashing import derive_seed, hash_value
from bessemer.core.metrics import MetricsLog
from bessemer.core.progress import Progress, Silent
from bessemer.core.usercode import load_user_function
from bessemer.data.corpus.reader import TRAIN, VALIDATION
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.model.decoder import Decoder
from bessemer.tokenization.prompts import fim_tokens
from bessemer.tokenization.shards import ANNEAL, TokenShards
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer
from bessemer.training.checkpoint.export import find_checkpoint
from bessemer.training.data.batch import Batch, concatenated
from bessemer.training.data.batches import StatelessBatches, TokenBatches, read_rows
from bessemer.training.data.packing import DocumentBatches
from bessemer.training.data.token_stream import DocumentSources, FillInTheMiddle
from bessemer.training.job import RunContext, RunOptions, TrainingHooks, TrainingJob
from bessemer.training.loop import OnStepEnd
from bessemer.training.monitoring.run_metrics import ThroughputCheck
from bessemer.training.optim.lr_schedule import log_spaced
from bessemer.training.optim.mup import scale_initial_weights, width_ratio
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.trainer import Trainer
from bessemer.training.validation import bits_per_byte

#: Folder of memory-mapped arrays computed once from the shards: row plans, sources of documents.
SCRATCH = ".checkpoints"


class AnnealedBatches(StatelessBatches):
    """One mixture of documents, and from a row on another, which starts at its own first row."""

    def __init__(self, first: TokenBatches | DocumentBatches, second: TokenBatches | DocumentBatches, start: int) -> None:
        """start: rows of the first mixture that are read before the second one."""
        assert first.batch_size == second.batch_size
        self.batch_size = first.batch_size
        self._first = first
        self._second = second
        self._start = start
        self.fingerprint = hash_value([first.fingerprint, second.fingerprint, start])

    def batch(self, step: int, rows: slice = slice(None), mesh: Mesh = ALONE) -> Batch:
        chosen = range(step * self.batch_size, (step + 1) * self.batch_size)[rows]
        switch = min(max(self._start, chosen.start), chosen.stop)
        of_first, of_second = range(chosen.start, switch), range(switch - self._start, chosen.stop - self._start)
        return concatenated(
            [read_rows(source, part) for source, part in ((self._first, of_first), (self._second, of_second)) if part]
        )


class PretrainingData:
    """The splits of a folder of tokens that a run trains on, checked before training."""

    def __init__(self, config: PretrainConfig, tokens: Path, tokenizer: Tokenizer) -> None:
        """Open `train` and, where the folder has it and the settings use it, `anneal`.

        Raises ArtefactError for tokens of another tokenizer, ConfigError for fill-in-the-middle without its control tokens or
        with an unknown source, and for a second mixture when no setting says which steps read it.
        """
        self._config = config
        self._begin_id = tokenizer.bos_id
        annealed = config.anneal_fraction != 0 and (tokens / ANNEAL).exists()
        if annealed and config.anneal_fraction is None and config.schedule != "wsd":
            raise ConfigError(
                f"anneal_fraction: the corpus has a second mixture, and schedule: {config.schedule} no decay to read it in; "
                "set the fraction of the steps that read it, or 0"
            )
        splits = [TRAIN, ANNEAL] if annealed else [TRAIN]
        self._shards = {split: TokenShards(tokens / split) for split in splits}
        for shards in self._shards.values():
            shards.check_tokenizer(tokenizer.hash, "the model")
        self._fim_tokens = fim_tokens(tokenizer) if config.fim_rate else None
        sources = sorted({name for shards in self._shards.values() for name in shards.sources} if config.fim_sources else [])
        for name in config.fim_sources:
            if name not in sources:
                raise ConfigError(f"fim_sources: no document has the source {name!r}{nearest(name, sources)}")

    @property
    def training_bytes(self) -> int:
        """UTF-8 bytes of the text of the split `train`."""
        return self._shards[TRAIN].bytes

    def batches(
        self, steps: int, seed: int, scratch: Path | None = None
    ) -> tuple[TokenBatches | DocumentBatches | AnnealedBatches, dict[str, float]]:
        """The batches of a run of `steps`, and their summary: epochs of each split, and the fraction of its rows that is
        filled.

        scratch: a folder for memory-mapped arrays that are computed once; None: they are in memory. Raises ArtefactError when
        there are too few tokens.
        """
        annealed = round(self._anneal_steps(steps)) if ANNEAL in self._shards else 0
        sizes = self._config.batch_sizes
        before, rows = sizes.rows_before(steps - annealed), sizes.rows_before(steps)
        first = self._of_split(TRAIN, seed, scratch)
        summary = _summary(first, before)
        if not annealed:
            return first, summary
        second = self._of_split(ANNEAL, derive_seed(seed, ANNEAL), scratch)
        summary |= {f"{ANNEAL}_{name}": value for name, value in _summary(second, rows - before).items()}
        return AnnealedBatches(first, second, before), summary

    def _anneal_steps(self, steps: int) -> float:
        fraction = self._config.anneal_fraction
        return self._config.decay_length(steps) if fraction is None else fraction * steps

    def _of_split(self, split: str, seed: int, scratch: Path | None) -> TokenBatches | DocumentBatches:
        config, shards = self._config, self._shards[split]
        rearranged = self._fill_in_the_middle(shards, seed)
        if config.packing == "documents":
            return DocumentBatches(
                shards,
                batch_size=config.batch_size,
                context_length=config.context_length,
                seed=seed,
                scratch=scratch,
                fill_in_the_middle=rearranged,
            )
        return TokenBatches(
            shards,
            batch_size=config.batch_size,
            context_length=config.context_length,
            seed=seed,
            sources=DocumentSources(shards, scratch) if len(shards.sources) > 1 else None,
            fill_in_the_middle=rearranged,
        )

    def _fill_in_the_middle(self, shards: TokenShards, seed: int) -> FillInTheMiddle | None:
        if self._fim_tokens is None:
            return None
        named = self._config.fim_sources
        return FillInTheMiddle(
            tokens=self._fim_tokens,
            begin_id=self._begin_id,
            rate=self._config.fim_rate,
            spm_rate=self._config.fim_spm_rate,
            seed=seed,
            sources=frozenset(place for place, name in enumerate(shards.sources) if name in named) if named else None,
        )


def _summary(batches: TokenBatches | DocumentBatches, rows: int) -> dict[str, float]:
    epochs = {"epochs": round(rows / batches.rows, 2)}
    return epochs | ({"filled": round(batches.filled, 4)} if isinstance(batches, DocumentBatches) else {})


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
    sample: Sample | None = None,
    measured_tokens_per_second: float | None = None,
    **options: Unpack[RunOptions],
) -> dict[str, Any]:
    """Train the model of folder `model` on `tokens/train`, validating on `tokens/validation`; resumes from `out`.

    The last steps read `tokens/anneal`, where it exists. Writes below `out`: `model/` and what `save_trained` puts beside it,
    `metrics.jsonl`, `samples.jsonl`, `autotune.json`, `checkpoints/`. A user's own loss and optimizer, and a checkpoint to
    start from, lie below `folder`. Returns the headline metrics. Raises ArtefactError when the tokens were encoded with
    another tokenizer than the model's or are too few, and what `train` raises.

    measured_tokens_per_second: the throughput from which `config.steps` was just computed. Raises StaleMeasurementError when
    the first steps contradict it.
    """
    run = RunContext(out, **options)
    tokenizer = load_tokenizer(model)
    data = PretrainingData(config, tokens, tokenizer)
    validation = TokenShards(tokens / VALIDATION)
    validation.check_tokenizer(tokenizer.hash, "the model")
    held_out = [] if sample is None or config.sample_prompts is not None else held_out_prompts(validation, tokenizer)
    throughput_check = None
    if measured_tokens_per_second is not None and config.steps is not None and _alone():
        throughput_check = ThroughputCheck(config.batch_size * config.context_length / measured_tokens_per_second, config.steps)
    loss = None if config.loss is None else load_user_function(config.loss, run.folder)
    checkpoint_source = None if config.init_from is None else find_checkpoint(config.init_from, run.folder)
    job = TrainingJob.open(config, model, run, description="pretrain")
    config, mesh = job.config, job.mesh
    assert config.steps is not None
    source, data_summary = data.batches(config.steps, derive_seed(run.seed, "batches"), out / SCRATCH)

    def initialise(decoder: Decoder) -> None:
        if config.mup_base_width is not None:
            _scale_by_width(config, config.mup_base_width, decoder, mesh, run.progress if mesh.leads else Silent())

    def validate(decoder: Decoder) -> OnStepEnd:
        samples = sample if mesh.alone else None
        return _PeriodicEvaluation(config, decoder, validation, model, out / SAMPLES, samples, held_out)

    hooks = TrainingHooks(validate, initialise, checkpoint_source, throughput_check)
    summary = job.train(source, objective=loss, hooks=hooks)
    # the report warns of too little text, which does not apply to a model that continues
    text = {"training_bytes": data.training_bytes} if checkpoint_source is None else {}
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
        self._validated_steps = config.validated_steps
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
    """Beginnings of a few documents, spread over all, for a model to continue; each ends after a whole word where words have
    spaces."""
    lengths = np.concatenate([np.empty(0, np.int64), *(part for part, _ in shards.lengths_and_sources())])
    starts = np.cumsum(lengths) - lengths
    # a document hardly longer than its prompt would leave nothing to continue
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
