"""Speed of pretraining on a processor, beside `transformers` with torch.compile and bf16: same weights, batch and optimizer.

    python benchmarks/pretraining.py                     # both sizes, two threads
    python benchmarks/pretraining.py --part train_1m     # one of them

Every arm starts from the same weights, of a short training in float32 on words of Python's own sources, and reads the same
batches. Arms: ours with attention in blocks (what a run chooses) and with PyTorch's fused attention, whose softmax is in
float32; the peer with fused and with its own attention, each with memory that the C library keeps (`mallopt`, as ours has it)
and without. First each arm's loss and gradient on one batch are compared with its own in float32, uncompiled. Then the arms
train in turn, each in a fresh process. A measurement is the best of three groups of steps, and refuses to speak when they
spread over 30 %: one other busy process makes a step several times slower. All hold float32 weights, multiply in bf16 by
autocast, clip the gradient to 1 and move by fused AdamW. The ratio is that to the peer's fastest arm, of our fastest arm, and
of our fastest arm whose gradient is as near to float32's as the peer's. Result, of both sizes: `pretraining.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import recording
from inference import THREAD_SETTINGS
from rounds import summary

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/training", "src/bessemer/model")

SIZES = {
    "train_1m": {
        "model": {
            "vocab_size": 4096, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 384, "max_position_embeddings": 256,
        },
        "batch": (16, 256),
        "steps": 8,
        "goal": 1.5,
    },
    "train_14m": {
        "model": {
            "vocab_size": 8192, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6,
            "num_key_value_heads": 6, "head_dim": 64, "intermediate_size": 1024, "max_position_embeddings": 512,
        },
        "batch": (8, 512),
        "steps": 2,
        "goal": 1.3,
    },
}  # fmt: skip
GROUPS, LARGEST_SPREAD, ROUNDS, ATTEMPTS = 3, 0.3, 3, 4
#: Steps of the training that makes the common weights.
WARM_STEPS = 60
#: By arm: whose it is, its attention, and whether the C library keeps freed memory.
ARMS = {
    "Bessemer, in blocks": ("bessemer", "blocked", True),
    "Bessemer, fused": ("bessemer", "sdpa", True),
    "transformers, fused": ("transformers", "sdpa", False),
    "transformers, fused, mallopt": ("transformers", "sdpa", True),
    "transformers, eager": ("transformers", "eager", False),
    "transformers, eager, mallopt": ("transformers", "eager", True),
}
#: Gradients are called equally exact up to this factor.
EQUAL = 1.05


def words(size: dict[str, Any], step: int) -> Any:
    """A batch of Python's own sources, a word an id: (rows, length + 1), frequent words frequent as in any text."""
    import torch

    rows, length = size["batch"]
    text = b" ".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))
    ids = torch.tensor([zlib.crc32(word) % size["model"]["vocab_size"] for word in text.split()])
    starts_B = torch.randint(0, len(ids) - length - 1, (rows,), generator=torch.Generator().manual_seed(step))
    return torch.stack([ids[start : start + length + 1] for start in starts_B.tolist()])


def warm(size: dict[str, Any], weights: Path) -> dict[str, float]:
    """Write the common weights."""
    import torch
    from safetensors.torch import save_file

    from bessemer.model.config import ModelConfig
    from bessemer.model.initialisation import initial_decoder
    from bessemer.training.pretrain_config import PretrainConfig

    config = PretrainConfig(steps=WARM_STEPS, learning_rate=3e-3, optimizer="adamw", dtype="float32", compile=False)
    trainer = _trainer(initial_decoder(ModelConfig(**size["model"]), seed=1), config, config.optimizer)
    loss = 0.0
    with trainer.runtime.running():
        for step in range(WARM_STEPS):
            loss = trainer.step(_batch(words(size, step))).loss
    save_file({name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}, weights)
    return {"loss": loss, "parameters": sum(torch.numel(weight) for weight in trainer.model.parameters())}


def bessemer(size: dict[str, Any], weights: Path, attention: str, threads: int, what: str) -> dict[str, Any]:
    """The loop's own step."""
    from safetensors.torch import load_file

    from bessemer.model.config import ModelConfig
    from bessemer.model.initialisation import initial_decoder
    from bessemer.training.pretrain_config import PretrainConfig

    rows, length = size["batch"]
    exact = what == "exact"
    config = PretrainConfig(
        steps=1,
        batch_size=rows,
        context_length=length,
        dtype="float32" if exact else "bfloat16",
        compile=not exact,
        threads=threads,
    )
    model = initial_decoder(ModelConfig(**size["model"]), seed=1)
    model.load_state_dict(load_file(weights), strict=False)
    trainer = _trainer(model, config, "adamw")
    if not exact:
        trainer.model.set_attention_backend(attention)
    batch = _batch(words(size, WARM_STEPS))
    with trainer.runtime.running():
        if what == "speed":
            return {
                "flops_per_token": model.config.flops_per_token(length),
                **_rates(lambda: trainer.step(batch), size),
            }
        loss = trainer.gradients(batch).loss
    return {"loss": loss, "gradients": {name: weight.grad for name, weight in trainer.model.named_parameters()}}


def _trainer(model: Any, config: Any, optimizer: str) -> Any:
    import torch

    from bessemer.distributed.mesh import ALONE
    from bessemer.training.model_setup import prepare_model
    from bessemer.training.objectives import build_objective
    from bessemer.training.optim.optimizers import build_optimizers
    from bessemer.training.runtime import Runtime
    from bessemer.training.trainer import Trainer

    config = config.with_changes(optimizer=optimizer)
    runtime = Runtime.of(config, torch.device("cpu"))
    with runtime.running():
        parts, _ = prepare_model(model, config, runtime, ALONE)
        optimizers = build_optimizers(parts, config)
    return Trainer(parts, optimizers, build_objective(config, parts.config), runtime, gradient_clip=1.0)


def _batch(rows: Any) -> Any:
    from bessemer.training.data.batch import Batch

    return Batch(rows[:, :-1], rows[:, 1:])


def transformers(size: dict[str, Any], weights: Path, attention: str, threads: int, what: str) -> dict[str, Any]:
    """The usual loop around a compiled `Qwen3ForCausalLM`."""
    import torch
    from safetensors.torch import load_file
    from torch.nn.functional import cross_entropy
    from transformers import Qwen3Config, Qwen3ForCausalLM

    exact = what == "exact"
    torch.set_num_threads(threads)
    model = Qwen3ForCausalLM(
        Qwen3Config(**size["model"], tie_word_embeddings=True, attn_implementation=attention, use_cache=False)
    )
    missing, unexpected = model.load_state_dict(
        {f"model.{name}": weight for name, weight in load_file(weights).items()}, strict=False
    )
    assert missing == ["lm_head.weight"] and not unexpected, (missing, unexpected)
    model.train()
    compiled = model if exact else torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    rows = words(size, WARM_STEPS)
    tokens_BT, targets_BT = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def loss_of() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=not exact):
            # shift_labels: the targets themselves, as ours has them
            return compiled(input_ids=tokens_BT, labels=targets_BT, shift_labels=targets_BT).loss

    def step() -> None:
        loss_of().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if what == "speed":
        return _rates(step, size)
    loss = loss_of()
    loss.backward()
    with torch.no_grad():
        logits = model(input_ids=tokens_BT).logits if exact else None
    if logits is not None:
        assert abs(float(cross_entropy(logits.flatten(0, 1), targets_BT.flatten())) - float(loss)) < 1e-4, "another loss"
    gradients = {
        name.removeprefix("model."): weight.grad for name, weight in model.named_parameters() if weight.grad is not None
    }
    return {"loss": float(loss), "gradients": gradients}


SIDES: dict[str, Callable[..., dict[str, Any]]] = {"bessemer": bessemer, "transformers": transformers}


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


def exactness(part: str, weights: Path, arm: str, threads: int) -> dict[str, float]:
    """An arm's loss, and how far its gradient is from that of the same side in float32, uncompiled: ‖g − g₃₂‖ / ‖g₃₂‖."""
    import torch

    side, attention, _ = ARMS[arm]
    exact = SIDES[side](SIZES[part], weights, attention, threads, "exact")
    rounded = SIDES[side](SIZES[part], weights, attention, threads, "rounded")
    assert exact["gradients"].keys() == rounded["gradients"].keys()
    difference, norm = (
        sum(float(value.double().square().sum()) for value in values) ** 0.5
        for values in (
            [rounded["gradients"][name] - gradient for name, gradient in exact["gradients"].items()],
            [torch.as_tensor(gradient) for gradient in exact["gradients"].values()],
        )
    )
    return {"loss": rounded["loss"], "exact_loss": exact["loss"], "gradient_error": difference / norm}


def apart(what: str, part: str, threads: int, weights: Path, arm: str = "") -> dict[str, float]:
    """One measurement in a process of its own. Its threads wait as `bessemer` has them, or, of the peer, as by default."""
    environment = {name: value for name, value in os.environ.items() if name not in THREAD_SETTINGS}
    if arm and ARMS[arm][0] == "bessemer":
        environment |= dict(zip(THREAD_SETTINGS, ("passive", "1000", "0"), strict=True))
    command = [sys.executable, "-W", "ignore", __file__, "--measure", what, "--part", part, "--threads", str(threads)]
    done = subprocess.run(
        [*command, "--weights", str(weights), "--arm", arm], capture_output=True, encoding="utf-8", env=environment
    )
    if done.returncode:
        raise SystemExit(f"{what} {arm}: {done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measured(what: str, part: str, threads: int, weights: Path, arm: str) -> dict[str, float]:
    """In the process that `apart` starts."""
    size = SIZES[part]
    if what == "warm":
        return warm(size, weights)
    if what == "matmul":
        return matmul(size, threads)
    side, attention, keeps_memory = ARMS[arm]
    if keeps_memory:
        from bessemer.training.runtime import keep_freed_memory

        keep_freed_memory()
    if what == "exactness":
        return exactness(part, weights, arm, threads)
    return SIDES[side](size, weights, attention, threads, "speed")


def compare(part: str, threads: int) -> dict[str, Any]:
    """All arms in turn; exactness, the rounds and their medians, and the ratios."""
    size = SIZES[part]
    rows, length = size["batch"]
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.safetensors"
        start = apart("warm", part, threads, weights)
        print(f"{part}: {start['parameters']:,} parameters, batch {rows} × {length}, {threads} threads", flush=True)
        exact = {arm: apart("exactness", part, threads, weights, arm) for arm in ARMS}
        rounds: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
        for _ in range(ROUNDS):
            for arm, runs in rounds.items():
                runs.append(apart("speed", part, threads, weights, arm))
        peak = apart("matmul", part, threads, weights)["gflops"]
    for arm, runs in rounds.items():
        if max(run["spread"] for run in runs) > LARGEST_SPREAD:
            raise SystemExit(f"{part}: times of {arm} spread; other work disturbs this machine, nothing is said")
    arms = {arm: {**exact[arm], "tokens_per_second": summary(run["tokens_per_second"] for run in rounds[arm])} for arm in ARMS}
    for arm, found in arms.items():
        print(
            f"  {arm:<32} {found['tokens_per_second']['median']:>10,.0f} tokens/s, loss {found['loss']:.4f} "
            f"({found['exact_loss']:.4f} in float32), gradient error {found['gradient_error']:.2%}"
        )
    ours = {arm: found for arm, found in arms.items() if ARMS[arm][0] == "bessemer"}
    peer, theirs = max(
        ((arm, found) for arm, found in arms.items() if arm not in ours),
        key=lambda item: item[1]["tokens_per_second"]["median"],
    )
    equal = {arm: one for arm, one in ours.items() if one["gradient_error"] <= EQUAL * theirs["gradient_error"]}
    ratios = {
        name: max((one["tokens_per_second"]["median"] for one in among.values()), default=0.0)
        / theirs["tokens_per_second"]["median"]
        for name, among in (("ratio", ours), ("ratio_at_equal_error", equal))
    }
    achieved = max(one["tokens_per_second"]["median"] for one in ours.values()) * rounds[next(iter(ours))][0]["flops_per_token"]
    print(
        f"  beside {peer}: ratio {ratios['ratio']:.2f}, at equal gradient error {ratios['ratio_at_equal_error']:.2f}, asked "
        f"{size['goal']}; {achieved / 1e9:.0f} of {peak:.0f} GFLOP/s ({achieved / 1e9 / peak:.0%})",
        flush=True,
    )
    return {
        "parameters": start["parameters"],
        "batch": [rows, length],
        "threads": threads,
        "arms": arms,
        "best_peer": peer,
        **ratios,
        "gflops": achieved / 1e9,
        "matmul_gflops": peak,
        "share_of_peak": achieved / 1e9 / peak,
    }


def tables(figures: dict[str, Any]) -> dict[str, Any]:
    columns: list[tuple[str, str]] = [("Training", ""), ("arm", ""), ("tokens/s", ",.0f"), ("of the best peer", ".2f~ ×")]
    rows: list[tuple[Any, ...]] = []
    for found in figures.values():
        name = f"{found['parameters'] / 1e6:.1f}M parameters, batch {' × '.join(map(str, found['batch']))}"
        best = found["arms"][found["best_peer"]]["tokens_per_second"]["median"]
        for arm, one in found["arms"].items():
            rate = one["tokens_per_second"]["median"]
            rows.append((name, arm, rate, rate / best, one["gradient_error"], one["loss"]))
            name = ""
    return {"speed": recording.table([*columns, ("gradient error", ".1%"), ("loss", ".4f")], rows)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(SIZES), help="one of the sizes alone, and no result")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", choices=("warm", "exactness", "speed", "matmul"), help=argparse.SUPPRESS)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measured(arguments.measure, arguments.part, arguments.threads, arguments.weights, arguments.arm)))
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
