"""The student's own answers: batches of them, and what the teacher says of those to held-out prompts.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from bessemer.core.hashing import hash_value
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.posttraining.distillation.config import DistillationConfig
from bessemer.posttraining.distillation.objective import mean_reverse_kl
from bessemer.posttraining.distillation.teacher import TeacherHead
from bessemer.posttraining.rl.sampler import EncodedPrompt, Sampler, SamplerSettings
from bessemer.posttraining.rl.samples import pack_samples
from bessemer.tokenization.tokenizer import Tokenizer
from bessemer.training.data.batches import Batch, rows_of_step
from bessemer.training.trainee import Trainee


class StudentBatches:
    """Batches of answers that the student samples with the weights of the step: a function of these and of the step's
    number."""

    lookahead = 0

    def __init__(self, prompts: Sequence[EncodedPrompt], tokenizer: Tokenizer, config: DistillationConfig, seed: int) -> None:
        self.batch_size = config.batch_size
        self._prompts = prompts
        self._config = config
        self._seed = seed
        self._padding_id = tokenizer.bos_id
        self._sampler = Sampler(tokenizer, sampler_settings(config, config.batch_size), seed)
        self._latest: tuple[int, Batch] | None = None
        self._tokens = 0
        self._metrics: dict[str, float] = {}
        self.fingerprint = hash_value([[ids for _, ids in prompts], seed])

    def bind(self, trainee: Trainee) -> None:
        """The student that samples."""
        self._sampler.bind(trainee)

    def batch_size_at(self, step: int) -> int:
        """Rows of the batch of `step`: its answers packed."""
        return self._batch_of(step).tokens_BT.shape[0]

    def batch(self, step: int, rows: slice, mesh: Mesh = ALONE) -> Batch:
        """The rows of the batch of `step`."""
        batch = self._batch_of(step)
        documents_BT = batch.document_ids_BT
        self._tokens += batch.tokens_BT.numel() if documents_BT is None else int((documents_BT > 0).sum())
        return batch.rows(rows)

    def state_dict(self) -> dict[str, Any]:
        """The number of tokens so far; batches need no state."""
        return {"tokens": self._tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self._tokens = state["tokens"]

    def take_metrics(self) -> dict[str, float]:
        """Figures of the batch that was sampled last, and the tokens of all so far."""
        metrics, self._metrics = self._metrics, {}
        return metrics | {"tokens": self._tokens}

    def _batch_of(self, step: int) -> Batch:
        if self._latest is None or self._latest[0] != step:
            self._latest = step, self._sampled(step)
        return self._latest[1]

    def _sampled(self, step: int) -> Batch:
        start = time.perf_counter()
        places: np.ndarray = rows_of_step(step, self._config.groups, len(self._prompts), self._seed)
        asked = [self._prompts[place] for place in places.tolist()]
        with self._sampler.sampling() as engine:
            samples = self._sampler.completions(engine, asked, self._config.samples_per_prompt, seeds=("step", step))
        self._metrics = {
            "completion_tokens": statistics.fmean(len(sample.completion_ids) for sample in samples),
            "cut_share": statistics.fmean(sample.is_cut for sample in samples),
            "rollout_seconds": round(time.perf_counter() - start, 3),
        }
        return pack_samples(samples, [True] * len(samples), self._padding_id).batch


class HeldOutDivergence:
    """KL(student ‖ teacher) on the student's own answers to held-out prompts, which each call samples anew from the same
    random numbers."""

    def __init__(
        self,
        prompts: Sequence[EncodedPrompt],
        tokenizer: Tokenizer,
        config: DistillationConfig,
        teacher: TeacherHead,
        seed: int,
    ) -> None:
        self._prompts = prompts
        self._teacher = teacher
        self._temperature = config.sampling_temperature
        self._padding_id = tokenizer.bos_id
        self._sampler = Sampler(tokenizer, sampler_settings(config, len(prompts)), seed)

    def measure(self, trainee: Trainee) -> float:
        """The mean over the answers' tokens, in nats. Weights and random state stay as they are."""
        self._sampler.bind(trainee)
        with self._sampler.sampling() as engine:
            samples = self._sampler.completions(engine, self._prompts, 1)
        batch = pack_samples(samples, [True] * len(samples), self._padding_id).batch
        return mean_reverse_kl(trainee, batch, self._teacher, self._temperature)


def sampler_settings(config: DistillationConfig, sequences: int) -> SamplerSettings:
    """How the student answers. sequences: answers that are asked for at once."""
    return SamplerSettings(
        config.sampling_temperature,
        config.max_tokens,
        config.context_length,
        sequences,
        cpu_kernels=config.cpu_kernels,
    )
