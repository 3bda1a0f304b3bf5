"""Published training runs, to validate the planner's predictions.

Only runs whose model, batch, layout, recomputation and GPU are all given. Sources: torchtitan, benchmarks of December 2024
(its cards: 96 GB of HBM2e at 2.4 TB/s, 500 of 700 W); Korthikanti et al. 2022, tables 3 and 5; Narayanan et al. 2021, section
5.1 and equation 4; nanochat's leaderboard, run 1 of January 2026.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from bessemer.distributed.layout import Layout
from bessemer.model.config import ModelConfig, preset_config
from bessemer.scaling.hardware import CARDS, Card
from bessemer.scaling.job import Candidate, PlannedJob
from bessemer.scaling.planner import Plan, evaluate
from bessemer.training.pretrain_config import PretrainConfig


@dataclass(frozen=True)
class PublishedRun:
    """A run as published, and the seconds of its step."""

    name: str
    model: ModelConfig
    card: Card
    settings: dict[str, Any]
    candidate: Candidate
    seconds: float


def _gpt(hidden: int, layers: int, heads: int) -> ModelConfig:
    """A GPT of Megatron's papers: 2,048 tokens, a vocabulary of 51,200."""
    return preset_config("gpt3-175b", 51_200).with_changes(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=4 * hidden,
    )


def _titan(name: str, tokens_per_second: float, **settings: Any) -> PublishedRun:
    """Llama 3.1 8B on 8 GPUs, two rows of 8,192 tokens each; selective recomputation."""
    values = {"batch_size": 16, "context_length": 8192, "optimizer": "adamw"} | settings
    card = replace(CARDS["h100"], memory=96 * 2**30, bandwidth=2.4e12)
    candidate = Candidate(Layout(data_shard=8), 2, "selective")
    return PublishedRun(name, preset_config("llama-3.1-8b", 128_256), card, values, candidate, 2 * 8192 / tokens_per_second)


def _megatron(
    name: str, model: ModelConfig, seconds: float, batch: int, layout: Layout, *, micro_batch_size: int = 1, stages: int = 1
) -> PublishedRun:
    """With sequence parallelism and selective recomputation."""
    schedule = "interleaved" if stages > 1 else "1f1b"
    candidate = Candidate(layout, micro_batch_size, "selective", schedule, stages)
    settings = {"batch_size": batch, "context_length": 2048, "optimizer": "adamw"}
    return PublishedRun(name, model, CARDS["a100"], settings, candidate, seconds)


#: Seconds of a step of 175B on 1,024 cards: 300B tokens in 34 days.
_SECONDS_175B = 34 * 86_400 * 1536 * 2048 / 300e9
_NANOCHAT = preset_config("qwen3-125m", 32_768).with_changes(
    hidden_size=1536,
    num_hidden_layers=24,
    num_attention_heads=12,
    num_key_value_heads=12,
    head_dim=128,
    intermediate_size=6144,
    gated_mlp=False,
    hidden_act="relu",
    tie_word_embeddings=False,
    layer_types=(*("sliding_attention",) * 3, "full_attention") * 6,
    sliding_window=1024,
)

RUNS = (
    _titan("torchtitan 8B, eager", 5762, compile=False),
    _titan("torchtitan 8B, compiled", 6667, compile=True),
    _titan("torchtitan 8B, float8", 8532, compile=True, float8=True),
    _megatron("Megatron 22B, 8 × A100", _gpt(6144, 48, 64), 1.10, 4, Layout(tensor=8), micro_batch_size=4),
    _megatron("Megatron 175B, 64 × A100", _gpt(12_288, 96, 96), 13.75, 64, Layout(tensor=8, pipeline=8), stages=3),
    _megatron("Megatron 530B, 280 × A100", _gpt(20_480, 105, 128), 37.83, 280, Layout(tensor=8, pipeline=35), stages=3),
    _megatron("Megatron 1T, 512 × A100", _gpt(25_600, 128, 160), 71.49, 512, Layout(tensor=8, pipeline=64)),
    PublishedRun(
        "Megatron 175B, 1,024 × A100, all computed again",
        _gpt(12_288, 96, 96),
        CARDS["a100"],
        {"batch_size": 1536, "context_length": 2048, "optimizer": "adamw"},
        Candidate(Layout(tensor=8, pipeline=8, data_shard=16), 1, "full"),
        _SECONDS_175B,
    ),
    PublishedRun(
        "nanochat d24, 8 × H100",
        _NANOCHAT,
        CARDS["h100"],
        {"batch_size": 256, "context_length": 2048, "optimizer": "muon"},
        Candidate(Layout(data_shard=8), 16),
        10_949.467 / 16_704,
    ),
)


def predicted(run: PublishedRun) -> Plan:
    """The planner's prediction of a run."""
    settings = PretrainConfig(steps=1, **run.settings)
    return evaluate(PlannedJob(run.model, settings, run.card), run.candidate)


def compared(run: PublishedRun) -> dict[str, Any]:
    """Published and predicted seconds of a step, model FLOPs utilisation by either, and the prediction's relative error."""
    plan = predicted(run)
    utilisation = plan.model_flops_utilisation
    return {
        "run": run.name,
        "seconds": run.seconds,
        "predicted": plan.timing.step,
        "utilisation": utilisation * plan.timing.step / run.seconds,
        "predicted_utilisation": utilisation,
        "error": plan.timing.step / run.seconds - 1,
    }
