"""Speed of pretraining on a processor, beside `transformers` with torch.compile and bf16: same model, batch and optimizer.

    python benchmarks/pretraining.py                     # both sizes, two threads
    python benchmarks/pretraining.py --part train_1m     # one of them

Ours and the peer train in turn, each in a fresh process, on random tokens. A measurement is the best of three groups of steps,
and refuses to speak when they spread over 30 %: one other busy process makes a step several times slower. Both hold float32
weights, multiply in bf16 by autocast, clip the gradient to 1 and move by fused AdamW. The share of the machine's own speed at
large bf16 products is printed beside. Result, of both sizes: `pretraining.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import recording
from rounds import summary

SIZES = {
    "train_1m": {
        "model": {
            "vocab_size": 4096, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 384, "max_position_embeddings": 256,
        },
        "batch": (16, 256),
        "steps": 8,
        "goal": 1.3,
    },
    "train_14m": {
        "model": {
            "vocab_size": 8192, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6,
            "num_key_value_heads": 6, "head_dim": 64, "intermediate_size": 1024, "max_position_embeddings": 512,
        },
        "batch": (8, 512),
        "steps": 2,
        "goal": 1.2,
    },
}  # fmt: skip
GROUPS, LARGEST_SPREAD, ROUNDS, ATTEMPTS = 3, 0.3, 3, 4


def ours(size: dict[str, Any], threads: int) -> dict[str, float]:
    """Tokens per second of the loop's own step."""
    import torch

    from bessemer.distributed.mesh import ALONE
    from bessemer.model.config import ModelConfig
    from bessemer.model.initialisation import initial_decoder
    from bessemer.training.config import PretrainConfig
    from bessemer.training.data.batches import Batch
    from bessemer.training.model_setup import prepare_model
    from bessemer.training.objectives import next_token_loss
    from bessemer.training.optim.build import build_optimizers
    from bessemer.training.runtime import Runtime
    from bessemer.training.train_step import TrainStep

    rows, length = size["batch"]
    config = PretrainConfig(
        steps=1, batch_size=rows, context_length=length, optimizer="adamw", dtype="bfloat16", compile=True, threads=threads
    )
    runtime = Runtime.of(config, torch.device("cpu"))
    with runtime.running():
        model, _ = prepare_model(initial_decoder(ModelConfig(**size["model"]), seed=1), config, runtime, ALONE)
        step = TrainStep(model, build_optimizers(model, config), next_token_loss, runtime, gradient_clip=1.0)
        tokens_BT = _tokens(size)
        batch = Batch(tokens_BT[:, :-1], tokens_BT[:, 1:])
        return {
            "parameters": model.config.parameters(),
            "flops_per_token": model.config.flops_per_token(length),
            **_rates(lambda: step.run(batch), size),
        }


def transformers(size: dict[str, Any], threads: int) -> dict[str, float]:
    """Tokens per second of the usual loop around a compiled `Qwen3ForCausalLM`."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(1)
    model = Qwen3ForCausalLM(
        Qwen3Config(**size["model"], tie_word_embeddings=True, attn_implementation="sdpa", use_cache=False)
    )
    model.train()
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens_BT = _tokens(size)[:, :-1].contiguous()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(input_ids=tokens_BT, labels=tokens_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {"parameters": sum(parameter.numel() for parameter in model.parameters()), **_rates(step, size)}


def matmul(size: dict[str, Any], threads: int) -> dict[str, float]:
    """GFLOP/s of a large bf16 product: what the machine can do at best."""
    import torch

    torch.set_num_threads(threads)
    left, right = (torch.randn(2048, 2048).bfloat16() for _ in range(2))
    left @ right
    best = 0.0
    for _ in range(10):
        start = time.perf_counter()
        left @ right
        best = max(best, 2 * 2048**3 / (time.perf_counter() - start) / 1e9)
    return {"gflops": best}


def _tokens(size: dict[str, Any]) -> Any:
    import torch

    rows, length = size["batch"]
    return torch.randint(0, size["model"]["vocab_size"], (rows, length + 1), generator=torch.Generator().manual_seed(1))


def _rates(step: Any, size: dict[str, Any]) -> dict[str, float]:
    """Best and spread of some groups of steps, after what is compiled is compiled."""
    rows, length = size["batch"]
    for _ in range(3):
        step()
    for _ in range(ATTEMPTS):
        times = []
        for _ in range(GROUPS):
            start = time.perf_counter()
            for _ in range(size["steps"]):
                step()
            times.append((time.perf_counter() - start) / size["steps"])
        spread = max(times) / min(times) - 1
        if spread <= LARGEST_SPREAD:
            break
    return {"tokens_per_second": rows * length / min(times), "spread": spread}


def apart(what: str, part: str, threads: int) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--measure", what, "--part", part, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{what}: {done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(part: str, threads: int) -> dict[str, Any]:
    """Ours and the peer in turn; the rounds and their medians."""
    size = SIZES[part]
    rounds = [(apart("ours", part, threads), apart("transformers", part, threads)) for _ in range(ROUNDS)]
    peak = apart("matmul", part, threads)["gflops"]
    for side in (one for both in rounds for one in both):
        if side["spread"] > LARGEST_SPREAD:
            raise SystemExit(f"{part}: times spread by {side['spread']:.0%}; other work disturbs this machine, nothing is said")
    mine, theirs = (summary(side["tokens_per_second"] for side in both) for both in zip(*rounds, strict=True))
    assert rounds[0][0]["parameters"] == rounds[0][1]["parameters"], "not the same model"
    parameters, ratio = rounds[0][0]["parameters"], mine["median"] / theirs["median"]
    achieved = mine["median"] * rounds[0][0]["flops_per_token"] / 1e9
    rows, length = size["batch"]
    print(f"{part}: {parameters:,.0f} parameters, batch {rows} × {length}, {threads} threads")
    print(f"  {'bessemer':<32} {mine['median']:>10,.0f} tokens/s")
    print(f"  {'transformers, compiled, bf16':<32} {theirs['median']:>10,.0f} tokens/s")
    print(
        f"  ratio {ratio:.2f}, asked {size['goal']}; {achieved:.0f} of {peak:.0f} GFLOP/s ({achieved / peak:.0%})",
        flush=True,
    )
    return {
        "parameters": parameters,
        "batch": [rows, length],
        "threads": threads,
        "tokens_per_second": {"bessemer": mine, "transformers": theirs},
        "ratio": ratio,
        "gflops": achieved,
        "matmul_gflops": peak,
        "share_of_peak": achieved / peak,
    }


def tables(figures: dict[str, Any]) -> dict[str, Any]:
    rows = [
        (
            f"{found['parameters'] / 1e6:.1f}M parameters, batch {' × '.join(map(str, found['batch']))}",
            *(side["median"] for side in found["tokens_per_second"].values()),
            found["ratio"],
            found["matmul_gflops"],
            found["share_of_peak"],
        )
        for found in figures.values()
    ]
    columns = [
        ("Training, tokens/s", ""),
        ("Bessemer", ",.0f"),
        ("transformers, compiled", ",.0f"),
        ("", ".2f~ ×"),
        ("GFLOP/s of a large product", ",.0f"),
        ("Bessemer's share of it", ".0%"),
    ]
    return {"speed": recording.table(columns, rows)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(SIZES), help="one of the sizes alone, and no result")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", choices=("ours", "transformers", "matmul"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure = {"ours": ours, "transformers": transformers, "matmul": matmul}[arguments.measure]
        print(json.dumps(measure(SIZES[arguments.part], arguments.threads)))
        return 0
    recording.needs("transformers", install="pip install '.[bench]'")
    figures = {part: compare(part, arguments.threads) for part in ([arguments.part] if arguments.part else SIZES)}
    if arguments.part:
        print(f"{arguments.part} alone: no result")
    else:
        print(recording.save("pretraining", figures, tables=tables(figures), peers=("torch", "transformers")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
