"""What serving a model takes: memory, how many conversations fit, how fast they are answered, what a million tokens cost.

A step of decoding reads the weights once for all sequences and the keys and values of each, and computes two FLOPs for each
active parameter and sequence; it takes as long as the slower of the two (the roofline; Williams et al. 2009). A prompt is read
at the rate of computing. Everything is predicted: what a server adds (scheduling, sampling, HTTP) is not in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bessemer.core.errors import ConfigError
from bessemer.model.config import ModelConfig
from bessemer.scaling.hardware import Card

#: Bytes of a weight: quantised ones have a scale of 16 bits for each block of 32.
WEIGHT_BYTES = {"f32": 4.0, "bf16": 2.0, "int8": 1 + 2 / 32, "int4": 0.5 + 2 / 32}
#: Assumption: fraction of the vendor's bandwidth reached by kernels that read weights and caches.
ACHIEVED_BANDWIDTH = 0.8
#: Assumption: fraction of the memory for activations and buffers of a step.
_STEP_SHARE = 0.05
_KV_BYTES = 2
_BATCHES = (1, 4, 16, 64, 256)


@dataclass(frozen=True)
class ServingJob:
    """A model on cards that share its matrices, and what a usual request is.

    weights: one of WEIGHT_BYTES. prompt, answer: tokens of a request.
    """

    model: ModelConfig
    card: Card
    gpus: int = 1
    weights: str = "bf16"
    prompt: int = 1000
    answer: int = 300

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights."""
        return self.model.parameters() * WEIGHT_BYTES[self.weights]

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the keys and values of a token, in half precision."""
        return self.model.kv_bytes_per_token(_KV_BYTES)

    @property
    def kv_memory(self) -> float:
        """Bytes left for keys and values. Raises ConfigError where the weights alone do not fit."""
        left = self.gpus * self.card.usable_memory * (1 - _STEP_SHARE) - self.weight_bytes
        if left <= 0:
            raise ConfigError(
                f"{self.weight_bytes / 1e9:.0f} GB of weights do not fit {self.gpus} × {self.card.name}; take more cards "
                "(--gpus), or fewer bits (--weights int8, int4)"
            )
        return left

    def conversations(self, tokens: int) -> int:
        """Number of conversations of `tokens` tokens that fit in memory at once."""
        return int(self.kv_memory // (self.kv_bytes_per_token * tokens)) if self.kv_bytes_per_token else 10**6

    def read_bytes(self, sequences: int) -> float:
        """Bytes of weights that a step reads: all but the experts that, on average, no sequence chose."""
        total, active = self.model.parameters(), self.model.active_parameters()
        if total == active:
            return self.weight_bytes
        experts, chosen = self.model.num_experts or 1, self.model.num_experts_per_tok or 1
        each = (total - active) / (experts - chosen)
        seen = experts * (1 - (1 - chosen / experts) ** sequences)
        return (active + each * (seen - chosen)) * WEIGHT_BYTES[self.weights]

    def step_seconds(self, sequences: int) -> float:
        """Seconds of a decoding step for sequences in the middle of their answers."""
        length = self.prompt + self.answer / 2
        read = self.read_bytes(sequences) + sequences * length * self.kv_bytes_per_token
        computed = sequences * self.model.flops_per_token(round(length)) / 3
        bandwidth = self.gpus * self.card.bandwidth * ACHIEVED_BANDWIDTH
        flops = self.gpus * self.card.flops * self.card.achievable
        return max(read / bandwidth, computed / flops) + self._sums_seconds(sequences)

    def prompt_seconds(self) -> float:
        """Seconds to prefill one prompt."""
        flops = self.gpus * self.card.flops * self.card.achievable
        # a token looks at those before it, half of the prompt on average
        return self.prompt * self.model.flops_per_token(max(1, self.prompt // 2)) / 3 / flops + self._sums_seconds(self.prompt)

    def _sums_seconds(self, tokens: int) -> float:
        """Seconds of the all-reduces, two in each layer; a ring sends 2 (n-1)/n of the bytes."""
        if self.gpus == 1:
            return 0.0
        sent = 2 * self.model.num_hidden_layers * tokens * self.model.hidden_size * 2
        return sent * 2 * (self.gpus - 1) / self.gpus / self.card.node_link

    def at(self, sequences: int) -> Load:
        """The load of `sequences` conversations at once, each of which starts the next when it ends."""
        step, prompt = self.step_seconds(sequences), self.prompt_seconds()
        # prompts are read between the steps, one after the other
        seconds = sequences * prompt + self.answer * step
        return Load(sequences, step, prompt, sequences * self.answer / seconds, sequences * self.prompt / seconds)


@dataclass(frozen=True)
class Load:
    """A number of conversations at once. step: seconds of a token; prompt: seconds of reading one; rates: tokens a second of
    all."""

    sequences: int
    step: float
    prompt: float
    answer_rate: float
    prompt_rate: float

    def dollars_per_million(self, dollars_an_hour: float) -> float:
        """Dollars per million tokens of answers, prompts included."""
        return dollars_an_hour / 3600 / self.answer_rate * 1e6


def serving_plan(job: ServingJob, price: float) -> dict[str, Any]:
    """Memory, and loads up to the most conversations that fit. price: dollars an hour of one card. Raises ConfigError."""
    context = job.model.max_position_embeddings
    usual = job.conversations(job.prompt + job.answer)
    if usual < 1:
        raise ConfigError(
            f"not one conversation of {job.prompt + job.answer:,} tokens fits beside the weights; take more cards (--gpus)"
        )
    return {
        "card": job.card.name,
        "gpus": job.gpus,
        "price_per_gpu_hour": price,
        "weights": job.weights,
        "parameters": job.model.parameters(),
        "active_parameters": job.model.active_parameters(),
        "weight_bytes": job.weight_bytes,
        "kv_bytes_per_token": job.kv_bytes_per_token,
        "kv_memory_bytes": job.kv_memory,
        "prompt_tokens": job.prompt,
        "answer_tokens": job.answer,
        "conversations": usual,
        "conversations_of_whole_context": job.conversations(context),
        "context": context,
        "loads": [
            {
                "conversations": load.sequences,
                "tokens_per_second_each": 1 / load.step,
                "prompt_seconds": load.prompt,
                "answer_tokens_per_second": load.answer_rate,
                "prompt_tokens_per_second": load.prompt_rate,
                "dollars_per_million_answer_tokens": load.dollars_per_million(price * job.gpus),
            }
            for load in map(job.at, _batches(usual))
        ],
    }


def _batches(most: int) -> Iterator[int]:
    yield from (batch for batch in _BATCHES if batch < most)
    yield most
