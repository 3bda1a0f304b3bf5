"""Tokens a second of quantised models that are not plain, by packed codes and by weights read out of their codes at each use.

    python benchmarks/packed_products.py [--rounds 3]

Weights are random. Each line: one architecture, int4 in groups of 32; steps of 1 and of 8 answers, and a prompt of 256 tokens.
Medians of the rounds, which are kept.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median
from typing import Any

import recording
from bessemer.core.environment import set_environment
from rounds import summary

set_environment()  # before PyTorch reads it: threads that wait do not spin

import torch  # noqa: E402

from bessemer.inference.execution.backend import Backend  # noqa: E402
from bessemer.inference.execution.batch import Batch  # noqa: E402
from bessemer.inference.execution.kv_cache import PagedMemory, layer_groups  # noqa: E402
from bessemer.inference.execution.linear import OwnWeights, PackedCodes  # noqa: E402
from bessemer.inference.execution.paged_attention import CompiledAttention, GatheredAttention  # noqa: E402
from bessemer.inference.execution.runner import Runner  # noqa: E402
from bessemer.model.config import ModelConfig  # noqa: E402
from bessemer.model.cpu_kernels import library, unavailable  # noqa: E402
from bessemer.model.decoder import Decoder  # noqa: E402
from bessemer.model.quantisation.config import QuantizeConfig  # noqa: E402
from bessemer.model.quantisation.quantise import quantise  # noqa: E402

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/model", "src/bessemer/inference")

BLOCK, PROMPT = 16, 256
BASE = ModelConfig(
    vocab_size=8192,
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_size=1024,
    max_position_embeddings=1024,
)
MODELS = {
    "8 experts, 2 visited": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 384},
    "latent attention": {
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "qk_norm": "none",
    },
    "linear attention": {
        "layer_types": ("linear_attention", "linear_attention", "full_attention") * 2,
        "linear_num_value_heads": 6,
        "linear_num_key_heads": 6,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
    },
}
KEYS = {"8 experts, 2 visited": "experts", "latent attention": "latent", "linear attention": "linear"}


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rounds", type=int, default=3)
    rounds = arguments.parse_args().rounds
    if library() is None:
        recording.not_run(f"there are no kernels to measure: {unavailable()}")
    figures: dict[str, Any] = {"threads": torch.get_num_threads(), "models": {}}
    rows = []
    for name, changes in MODELS.items():
        torch.manual_seed(0)
        model = Decoder(BASE.with_changes(**changes)).eval()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        quantise(model, QuantizeConfig(scheme="int4", method="rtn", group_size=32))
        ways = {"unpacked": runner_of(model, packed=False), "packed": runner_of(model, packed=True)}
        speeds: dict[str, dict[str, list[float]]] = {way: {} for way in ways}
        for _ in range(rounds):
            for way, runner in ways.items():
                for answers in (1, 8):
                    speed = answers / seconds_of(runner, decoding(model, answers))
                    speeds[way].setdefault(f"answers_{answers}", []).append(speed)
                speed = PROMPT / seconds_of(runner, prompt(model))
                speeds[way].setdefault("prompt", []).append(speed)
        found = {way: {what: summary(each) for what, each in of.items()} for way, of in speeds.items()}
        medians = {way: {what: each["median"] for what, each in of.items()} for way, of in found.items()}
        figures["models"][KEYS[name]] = {"parameters": parameters, "tokens_per_second": found}
        ratios = [medians["packed"][what] / medians["unpacked"][what] for what in medians["packed"]]
        rows.append([f"{name}, {parameters / 1e6:.1f}M", *medians["unpacked"].values(), *medians["packed"].values()])
        rows[-1] += [", ".join(f"{ratio:.1f}" for ratio in ratios)]
        for way, of in medians.items():
            print(f"{name}, {way}: {', '.join(f'{what} {speed:,.0f} tokens/s' for what, speed in of.items())}")
    print(json.dumps(figures))
    ways = [(f"{way}: {what}", ",.0f") for way in ("read out", "packed") for what in ("1 answer", "8", "a prompt")]
    table = recording.table([("tokens/s", ""), *ways, ("ratios", "")], rows)
    recording.save("packed_products", figures, tables={"speeds": table})


def runner_of(model: Decoder, packed: bool) -> Runner:
    groups = layer_groups(model.config)
    slots = 9 if "linear_attention" in model.config.types else 0
    memory = PagedMemory(model.config, [9 * (PROMPT // BLOCK + 1)] * len(groups), BLOCK, torch.float16, state_slots=slots)
    threads = torch.get_num_threads()
    compiled = CompiledAttention.supports(model)
    attention = CompiledAttention(memory, threads, model.dtype) if compiled else GatheredAttention(memory, model.dtype)
    return Runner(model, memory, Backend(PackedCodes(model, threads) if packed else OwnWeights(), attention))


def batch_of(model: Decoder, rows: list[tuple[int, int, int]]) -> Batch:
    """(answer, from, to) of each; the logits of the last tokens."""
    blocks = PROMPT // BLOCK + 1
    groups = len(layer_groups(model.config))
    has_states = "linear_attention" in model.config.types
    batch = Batch.empty(groups)
    for answer, start, end in rows:
        batch.append_tokens(
            [(7 * position + answer) % model.config.vocab_size for position in range(start, end)],
            start,
            [list(range(answer * blocks, (answer + 1) * blocks)) for _ in range(groups)],
            wanted=[end - start - 1],
            prompt_length=PROMPT,
            slot=answer if has_states else None,
        )
    return batch


def decoding(model: Decoder, answers: int) -> Batch:
    return batch_of(model, [(answer, 100, 101) for answer in range(answers)])


def prompt(model: Decoder) -> Batch:
    return batch_of(model, [(8, 0, PROMPT)])


def seconds_of(runner: Runner, batch: Batch) -> float:
    """Median of a step, over half a second and at least three."""
    runner.forward(batch)
    trials: list[float] = []
    until = time.perf_counter() + 0.5
    while time.perf_counter() < until or len(trials) < 3:
        begun = time.perf_counter()
        runner.forward(batch)
        trials.append(time.perf_counter() - begun)
    return median(trials)


if __name__ == "__main__":
    main()
