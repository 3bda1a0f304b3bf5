"""Architectures side by side: equal parameters (experts: equal active FLOPs), tokens, data, order, seed and optimizer.

    python benchmarks/architectures.py [--steps 300] [--out FOLDER] [--offline]

An LSTM beside the decoder; a dense feed-forward beside experts, balanced by a loss, by a bias, and not at all; attention beside
a hybrid with gated DeltaNet; rotary positions beside ALiBi, learned ones and none. The data is the quickstart's: documentation
inside pinned Python packages, and the standard library's alone where there is no package index. Every architecture trains
whole at each of the same learning rates, and its best counts; speed is measured apart, in turns.

About 20 minutes on two quiet cores. What is finished in the folder is not done again. Draws the curves there, as
architectures.svg. Result: `architectures.json`.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

import bessemer.pipeline.api
import bessemer.views
import recording
from bessemer.core.hashing import derive_seed, hash_value
from bessemer.core.metrics import read_metrics
from bessemer.core.progress import PlainLines
from bessemer.core.store import read_json, write_json
from bessemer.distributed.collectives import clip_gradients
from bessemer.distributed.mesh import ALONE
from bessemer.model.config import ModelConfig
from bessemer.model.device import is_fast
from bessemer.model.initialisation import initial_decoder
from bessemer.tokenization.shards import TokenShards
from bessemer.training.data.batch import IGNORE_INDEX, Batch
from bessemer.training.data.batches import TokenBatches
from bessemer.training.loop import train
from bessemer.training.objectives import linear_cross_entropy, next_token_loss
from bessemer.training.optim.lr_schedule import evenly_spaced
from bessemer.training.optim.optimizers import build_optimizers, scale_learning_rates, step_optimizers
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.runtime import Runtime
from bessemer.training.trainer import Trainer
from bessemer.training.validation import bits_per_byte
from rounds import summary

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/model", "src/bessemer/training", "src/bessemer/data", "src/bessemer/tokenization")

# Shapes: B batch, T time, D hidden, V vocabulary.

SEED = 7
BATCH_SIZE, CONTEXT = 4, 256
#: A search begins with the middle three, and goes on while the best is the outermost that was tried.
LEARNING_RATES, FIRST, WARMUP = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), slice(2, 5), 0.1
VALIDATIONS, VALIDATION_TOKENS = 6, 32_768
#: Steps over which the load of experts is averaged, at the beginning and at the end.
LOAD_STEPS = 10
LENGTHS, LENGTH_TOKENS = (256, 1024, 4096), 4096
#: Rounds and steps a round of the measurement of speed.
ROUNDS, ROUND_STEPS = 5, 3

DECODER: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 384,
    "max_position_embeddings": CONTEXT,
}
#: A token visits 2 of 8 experts, each half as wide as the dense feed-forward: the router is all that it does more.
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 192}


@dataclass(frozen=True)
class Arm:
    """One model of the benchmark. settings: what differs from DECODER; None for the LSTM.

    equal_parameters: the width of the feed-forward is chosen so that the model has as many as the decoder.
    rate_of: the arm whose learning rate it takes; its own search when None.
    """

    settings: dict[str, Any] | None
    equal_parameters: bool = True
    rate_of: str | None = None
    seed: int = SEED


ARMS = {
    "decoder": Arm({}),
    "decoder, another seed": Arm({}, rate_of="decoder", seed=SEED + 1),
    "LSTM": Arm(None),
    "experts, loss": Arm(EXPERTS | {"router_aux_loss_coef": 0.01}, equal_parameters=False),
    # a step of 0.001, as DeepSeek-V3 takes, would not get anywhere in so few steps
    "experts, bias": Arm(
        EXPERTS | {"scoring_func": "sigmoid", "router_correction_bias": True, "router_bias_update_rate": 0.01},
        equal_parameters=False,
    ),
    "experts, unbalanced": Arm(EXPERTS, equal_parameters=False, rate_of="experts, loss"),
    "hybrid": Arm({"layer_types": ("linear_attention",) * 3 + ("full_attention",)}),
    "ALiBi": Arm({"position_type": "alibi"}),
    "learned positions": Arm({"position_type": "learned"}),
    "no positions": Arm({"position_type": "none"}),
}
COMPARISONS = {
    "LSTM and decoder": ["decoder", "LSTM"],
    "Dense and experts": ["decoder", "experts, loss", "experts, bias", "experts, unbalanced"],
    "Attention and hybrid": ["decoder", "hybrid"],
    "Positions (the decoder's are rotary)": ["decoder", "ALiBi", "learned positions", "no positions"],
}


class Lstm(nn.Module):
    """Embedding, two layers of LSTM, a projection back, and the embedding as head: the language model before the transformer.

    Its state begins at zero in every row, so that it knows no more of a text than the decoder does.
    """

    def __init__(self, vocab_size: int, embedding: int, hidden: int, layers: int = 2) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, embedding)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True)
        self.proj = nn.Linear(hidden, embedding, bias=False)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        with torch.no_grad():  # begin by remembering (Jozefowicz et al. 2015): the forget gate is the second of four
            for name, bias in self.lstm.named_parameters():
                if name.startswith("bias_ih"):
                    bias[hidden : 2 * hidden] = 1.0

    @property
    def head_weight(self) -> Tensor:
        return self.embed_tokens.weight

    @property
    def logit_softcap(self) -> None:
        return None

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        states_BTH, _ = self.lstm(self.embed_tokens(tokens_BT))
        return self.proj(states_BTH)

    def flops_per_token(self) -> int:
        """Six a weight that multiplies, as `ModelConfig.flops_per_token` counts."""
        return 6 * sum(parameter.numel() for parameter in self.parameters() if parameter.ndim > 1)

    def optimizer(self, config: PretrainConfig) -> AdamW:
        """AdamW, where what decays is what decays in the decoder: every matrix but the embedding."""
        matrices = [*(weight for name, weight in self.lstm.named_parameters() if "weight" in name), self.proj.weight]
        others = [self.embed_tokens.weight, *(bias for name, bias in self.lstm.named_parameters() if "bias" in name)]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return optimizer

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy of the batch, in nats."""
        hidden_ND, targets_N = self.hidden(batch.tokens_BT).flatten(0, 1), batch.targets_BT.flatten()
        return linear_cross_entropy(hidden_ND, self.head_weight, targets_N) / (targets_N != IGNORE_INDEX).sum()


def decoder_config(arm: Arm, vocab_size: int, **changes: Any) -> ModelConfig:
    """The config of an arm; with the feed-forward that brings its parameters nearest to the decoder's."""
    assert arm.settings is not None
    config = ModelConfig(vocab_size=vocab_size, **DECODER, **arm.settings)
    if arm.equal_parameters:
        wanted = ModelConfig(vocab_size=vocab_size, **DECODER).parameters()
        widths = range(DECODER["intermediate_size"] // 2, 2 * DECODER["intermediate_size"])
        candidates = (config.with_changes(intermediate_size=width) for width in widths)
        config = min(candidates, key=lambda candidate: abs(candidate.parameters() - wanted))
    return config.with_changes(**changes)


def make_lstm(vocab_size: int, seed: int) -> Lstm:
    """The LSTM whose width brings its parameters nearest to the decoder's."""
    wanted = ModelConfig(vocab_size=vocab_size, **DECODER).parameters()

    def parameters(hidden: int) -> int:
        with torch.device("meta"):
            return count(Lstm(vocab_size, DECODER["hidden_size"], hidden))

    torch.manual_seed(derive_seed(seed, "weights"))
    return Lstm(vocab_size, DECODER["hidden_size"], min(range(64, 512), key=lambda hidden: abs(parameters(hidden) - wanted)))


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# --- training -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """What all arms share: the tokens, the type of the products, the length, and the folder of results."""

    train: TokenShards
    validation: TokenShards
    dtype: str
    steps: int
    threads: int | None
    out: Path

    def config(self, steps: int, rate: float, **changes: Any) -> PretrainConfig:
        return PretrainConfig(
            steps=steps,
            batch_size=BATCH_SIZE,
            context_length=CONTEXT,
            optimizer="adamw",
            learning_rate=rate,
            warmup_fraction=WARMUP,
            dtype=self.dtype,
            compile=False,
            threads=self.threads,
        ).with_changes(**changes)

    def runtime(self) -> Runtime:
        return Runtime.of(self.config(1, 1e-3), torch.device("cpu"))

    def batches(self, config: PretrainConfig, seed: int) -> TokenBatches:
        length, rows = config.context_length, config.batch_size
        return TokenBatches(self.train, batch_size=rows, context_length=length, seed=derive_seed(seed, "batches"))

    def run(self, name: str, rate: float) -> dict[str, Any]:
        """Train an arm, or read what it came to before. Returns its curve and figures."""
        arm = ARMS[name]
        config = self.config(self.steps, rate)
        identity = hash_value(
            [
                config.output_settings(),
                None if arm.settings is None else decoder_config(arm, self.train.vocab_size).output_settings(),
                *(self.train.fingerprint, self.validation.fingerprint, arm.seed, VALIDATIONS, VALIDATION_TOKENS),
                *(self.runtime().threads, torch.__version__),
            ]
        )
        folder = self.out / "models" / re.sub(r"\W+", "-", f"{name} {self.steps} {rate:g}")
        if (folder / "result.json").exists():
            found = read_json(folder / "result.json")
            if found["identity"] == identity:
                return found
        if arm.settings is None:  # it keeps no checkpoints
            shutil.rmtree(folder, ignore_errors=True)
        elif (folder / "identity").exists() and (folder / "identity").read_text(encoding="utf-8") != identity:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "identity").write_text(identity, encoding="utf-8")
        validated = evenly_spaced(self.steps, VALIDATIONS)
        result = (self._train_lstm if arm.settings is None else self._train_decoder)(arm, config, folder, validated)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        write_json(folder / "result.json", {"identity": identity, "learning_rate": rate, "steps": self.steps, **result})
        return read_json(folder / "result.json")

    def score(self, model: Any) -> float:
        """Bits per byte of the first held-out documents."""
        score = bits_per_byte(
            model, self.validation, context_length=CONTEXT, batch_size=BATCH_SIZE, max_tokens=VALIDATION_TOKENS
        )
        return score.bits_per_byte

    def _train_decoder(self, arm: Arm, config: PretrainConfig, folder: Path, validated: frozenset[int]) -> dict[str, Any]:
        runtime = self.runtime()
        model = initial_decoder(decoder_config(arm, self.train.vocab_size), derive_seed(arm.seed, "model"))

        def on_step_end(finished: int, trainer: Trainer) -> dict[str, float]:
            if finished not in validated:
                return {}
            with runtime.evaluating(model):
                return {"bits_per_byte": self.score(model)}

        batches = self.batches(config, arm.seed)
        train(
            model,
            batches,
            config,
            folder,
            runtime=runtime,
            seed=arm.seed,
            on_step_end=on_step_end,
            progress=PlainLines(interval=30),
        )
        records = read_metrics(folder / "metrics.jsonl")
        loads = [record["expert_load_max"] for record in records if "expert_load_max" in record]
        balance = {"load_first": mean(loads[:LOAD_STEPS]), "load_last": mean(loads[-LOAD_STEPS:])} if loads else {}
        points = [(record["step"], record["bits_per_byte"]) for record in records if "bits_per_byte" in record]
        return {
            "curve": [(step * BATCH_SIZE * CONTEXT, value) for step, value in points],
            "bits_per_byte": points[-1][1],
            "parameters": model.config.parameters(),
            "active_parameters": model.config.active_parameters(),
            "flops_per_token": model.config.flops_per_token(CONTEXT),
            **balance,
        }

    def _train_lstm(self, arm: Arm, config: PretrainConfig, folder: Path, validated: frozenset[int]) -> dict[str, Any]:
        runtime, batches = self.runtime(), self.batches(config, arm.seed)
        assert config.steps is not None
        curve = []
        with runtime.running():
            model = make_lstm(self.train.vocab_size, arm.seed)
            optimizers = [model.optimizer(config)]
            for step in range(config.steps):
                scale_learning_rates(optimizers, config.learning_rates.factor(step))
                lstm_step(model, batches.batch(step), optimizers, runtime, config)
                if step + 1 in validated:
                    with torch.no_grad(), runtime.autocast():
                        curve.append(((step + 1) * BATCH_SIZE * CONTEXT, self.score(model)))
        return {
            "curve": curve,
            "bits_per_byte": curve[-1][1],
            "parameters": count(model),
            "active_parameters": count(model),
            "flops_per_token": model.flops_per_token(),
        }


def search(bench: Bench, name: str) -> list[dict[str, Any]]:
    """The runs of an architecture in the order of their learning rates, the best of which has one on either side."""
    runs = {rate: bench.run(name, rate) for rate in LEARNING_RATES[FIRST]}  # finished ones are read
    while True:
        best = LEARNING_RATES.index(min(runs, key=lambda rate: runs[rate]["bits_per_byte"]))
        beside = [rate for rate in LEARNING_RATES[max(best - 1, 0) : best + 2] if rate not in runs]
        if not beside:
            return [runs[rate] for rate in sorted(runs)]
        runs |= {rate: bench.run(name, rate) for rate in beside}


def lstm_step(model: Lstm, batch: Batch, optimizers: list[Any], runtime: Runtime, config: PretrainConfig) -> None:
    with runtime.autocast():
        loss = model.loss(batch)
    loss.backward()
    clip_gradients(model.parameters(), config.gradient_clip, ALONE)
    step_optimizers(optimizers)


def mean(values: list[float]) -> float:
    return round(statistics.fmean(values), 3)


# --- speed --------------------------------------------------------------------------------------------------------


def stepper(bench: Bench, runtime: Runtime, name: str, length: int = CONTEXT, rows: int = BATCH_SIZE) -> Callable[[], None]:
    """A function that takes one training step of an arm, at a context and a number of rows."""
    arm, vocab_size = ARMS[name], bench.train.vocab_size
    config = bench.config(1, 1e-3, context_length=length, batch_size=rows)
    batch = bench.batches(config, SEED).batch(0)
    if arm.settings is None:
        lstm = make_lstm(vocab_size, SEED)
        optimizers: list[Any] = [lstm.optimizer(config)]
        return lambda: lstm_step(lstm, batch, optimizers, runtime, config)
    model = initial_decoder(decoder_config(arm, vocab_size, max_position_embeddings=max(length, CONTEXT)), SEED)
    runtime.compile_blocks(model, alone=True)
    trainer = Trainer(model, build_optimizers(model, config), next_token_loss, runtime, gradient_clip=config.gradient_clip)

    def one() -> None:
        trainer.step(batch)

    return one


def tokens_per_second(bench: Bench, wanted: dict[Any, tuple[str, int, int]]) -> dict[Any, dict[str, Any]]:
    """Tokens a second of training by label, of rounds in which all take turns. wanted: arm, context and rows."""
    runtime = bench.runtime()
    with runtime.running():
        steps = {label: stepper(bench, runtime, *what) for label, what in wanted.items()}
        seconds: dict[Any, list[float]] = {label: [] for label in steps}
        for step in steps.values():
            step()
        for _ in range(ROUNDS):
            for label, step in steps.items():
                start = time.perf_counter()
                for _ in range(ROUND_STEPS):
                    step()
                seconds[label].append((time.perf_counter() - start) / ROUND_STEPS)
    return {label: summary(rows * length / taken for taken in seconds[label]) for label, (_, length, rows) in wanted.items()}


# --- who bites whom -----------------------------------------------------------------------------------------------

ANIMALS, BITES, WHO = 12, 12, 13
DOG, MAN = 0, 1
TELLING_STEPS = 150
TELLING = {"rotary, 1 layer": ("rotary", 1), "no positions, 1 layer": ("none", 1), "no positions, 2 layers": ("none", 2)}


def who_bites_whom() -> dict[str, dict[str, Any]]:
    """`dog bites man` and `man bites dog`: how far apart the logits after them are before training, and how often a model
    that has been trained on all pairs of animals names the one that bites.

    Attention without positions sees a set, so one layer cannot tell them apart, and half is all it can get. With a second
    layer it can: the causal mask shows each token another number of tokens, which the first layer passes on (Haviv et al.
    2022).
    """
    pairs = [(first, second) for first in range(ANIMALS) for second in range(ANIMALS) if first != second]
    tokens_BT = torch.tensor([(first, BITES, second, WHO) for first, second in pairs])
    targets_BT = torch.full_like(tokens_BT, IGNORE_INDEX)
    targets_BT[:, -1] = tokens_BT[:, 0]
    config = PretrainConfig(steps=TELLING_STEPS, optimizer="adamw", learning_rate=1e-2, dtype="float32", compile=False)
    runtime, by_label = Runtime.of(config, torch.device("cpu")), {}
    for label, (positions, layers) in TELLING.items():
        shape = {
            "hidden_size": 32,
            "num_hidden_layers": layers,
            "head_dim": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        }
        model_config = ModelConfig(vocab_size=WHO + 1, **shape, intermediate_size=64, position_type=positions)
        with runtime.running():
            model = initial_decoder(model_config, SEED)
            with torch.no_grad():
                bitten, biting = model(torch.tensor([[DOG, BITES, MAN, WHO], [MAN, BITES, DOG, WHO]]))[:, -1]
            runtime.compile_blocks(model, alone=True)
            trainer = Trainer(model, build_optimizers(model, config), next_token_loss, runtime, gradient_clip=1.0)
            for _ in range(TELLING_STEPS):
                trainer.step(Batch(tokens_BT, targets_BT))
            with runtime.evaluating(model):
                right = (model(tokens_BT)[:, -1].argmax(-1) == tokens_BT[:, 0]).float().mean().item()
        difference = ((bitten - biting).norm() / bitten.norm()).item()
        by_label[key_of(label)] = {"model": label, "difference_untrained": difference, "right_after_training": right}
    return by_label


# --- results ------------------------------------------------------------------------------------------------------


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """The curves of every comparison, in the colours of the report."""
    import matplotlib
    from matplotlib.figure import Figure

    style = (Path(bessemer.views.__file__).parent / "style.css").read_text(encoding="utf-8")
    colours = dict(re.findall(r"--([\w-]+): light-dark\((#\w+),", style))
    with matplotlib.rc_context({"svg.hashsalt": "bessemer", "font.size": 8.0, "text.color": colours["ink"]}):
        figure = Figure(figsize=(9, 6.6), layout="constrained", facecolor=colours["paper"])
        for axes, (title, names) in zip(figure.subplots(2, 2).flat, COMPARISONS.items(), strict=True):
            for index, name in enumerate(names, start=1):
                tokens, values = zip(*results[name]["curve"], strict=True)
                label = f"{name} {values[-1]:.3f}"
                thousands = [number / 1000 for number in tokens]
                axes.plot(
                    thousands, values, color=colours[f"curve-{index}"], linewidth=1.6, marker="o", markersize=3, label=label
                )
            axes.set_title(title, loc="left", fontsize=9, weight="bold", color=colours["ink"])
            axes.set_xlabel("thousand tokens", color=colours["soft"], loc="right")
            axes.set_ylabel("bits per byte, held out", color=colours["soft"])
            axes.patch.set_visible(False)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.spines["bottom"].set_color(colours["soft"])
            axes.grid(axis="y", color=colours["line"], linewidth=0.6)
            axes.tick_params(colors=colours["soft"], length=0)
            axes.legend(frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def without_identity(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key != "identity"}


def key_of(name: str) -> str:
    """A name as a key of the result."""
    return re.sub(r"\W+", "_", name.lower())


def tables(figures: dict[str, Any]) -> dict[str, Any]:
    """All models; their learning rates; the load of experts; speed by context; and who bites whom."""
    models, speeds = figures["models"], figures["tokens_per_second"]
    reference = models["decoder"]["bits_per_byte"]
    columns = [
        ("", ""),
        ("weights", ",.0f"),
        ("active", ",.0f"),
        ("MFLOP/token", ".2f"),
        ("learning rate", "g"),
        ("bits/byte", ".4f"),
        ("beside the decoder", "+.4f"),
        ("tokens/s", ",.0f"),
    ]
    rows = [
        (
            found["name"],
            found["parameters"],
            found["active_parameters"],
            found["flops_per_token"] / 1e6,
            found["learning_rate"],
            found["bits_per_byte"],
            found["bits_per_byte"] - reference if key != "decoder" else None,
            speeds.get(key, {}).get("median"),
        )
        for key, found in models.items()
    ]
    rates = [f"{rate:g}" for rate in LEARNING_RATES]
    searched = [found for found in models.values() if len(found["by_rate"]) > 1]
    by_rate = [(found["name"], *(found["by_rate"].get(rate) for rate in rates)) for found in searched]
    loads = [(found["name"], found["load_first"], found["load_last"]) for found in models.values() if "load_last" in found]
    by_length = [
        (models[key]["name"], *(speed["median"] for speed in found.values()))
        for key, found in figures["tokens_per_second_by_context"].items()
    ]
    by_label = [
        (row["model"], row["difference_untrained"], row["right_after_training"]) for row in figures["who_bites_whom"].values()
    ]
    return {
        "models": recording.table(columns, rows),
        "rates": recording.table([("Bits per byte by learning rate", ""), *((rate, ".4f") for rate in rates)], by_rate),
        "load": recording.table(
            [
                ("Load of the busiest expert, 1 is even", ""),
                (f"first {LOAD_STEPS} steps", ".2f"),
                (f"last {LOAD_STEPS}", ".2f"),
            ],
            loads,
        ),
        "contexts": recording.table(
            [
                (f"Training tokens/s, {LENGTH_TOKENS:,} tokens a step", ""),
                *((f"context {length:,}", ",.0f") for length in LENGTHS),
            ],
            by_length,
        ),
        "who_bites_whom": recording.table(
            [
                ("`dog bites man`, `man bites dog`", ""),
                ("difference of the logits, untrained", ".1e"),
                ("right after training", ".0%"),
            ],
            by_label,
        ),
    }


def tokens(out: Path, offline: bool) -> Path:
    """The quickstart's tokens: collected, cleaned and tokenised by Bessemer itself, a vocabulary of 4,096 by BPE."""
    overrides = {"collect": [{"source": "python_docs"}]} if offline else {}
    made = bessemer.pipeline.api.run(
        "quickstart", overrides, name="data", runs=out / "runs", until="tokenize", progress=PlainLines(interval=30)
    )
    return made.folder / "tokens"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of 1,024 tokens of every model")
    parser.add_argument("--out", type=Path, default=Path("runs/architectures"), help="folder of the results")
    parser.add_argument("--offline", action="store_true", help="data of the standard library alone")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="type of the products")
    parser.add_argument("--threads", type=int, help="processor threads; all usable cores when absent")
    arguments = parser.parse_args()
    started = time.perf_counter()
    folder = tokens(arguments.out, arguments.offline)
    dtype = arguments.dtype
    if dtype == "auto":
        dtype = "bfloat16" if is_fast(torch.bfloat16, torch.device("cpu")) else "float32"
    bench = Bench(
        *(TokenShards(folder / split) for split in ("train", "validation")),
        *(dtype, arguments.steps, arguments.threads, arguments.out),
    )
    results: dict[str, dict[str, Any]] = {}
    for name, arm in ARMS.items():
        runs = search(bench, name) if arm.rate_of is None else [bench.run(name, results[arm.rate_of]["learning_rate"])]
        scores = {run["learning_rate"]: run["bits_per_byte"] for run in runs}
        best = min(runs, key=lambda run: run["bits_per_byte"])
        results[name] = {**best, "by_rate": scores}
        tried = ", ".join(f"{rate:g}: {score:.4f}" for rate, score in scores.items())
        print(f"{name:<24} bits per byte by learning rate: {tried}", flush=True)
    timed = [name for name in ARMS if name not in ("decoder, another seed", "experts, unbalanced")]
    speeds = tokens_per_second(bench, {name: (name, CONTEXT, BATCH_SIZE) for name in timed})
    pairs = [(name, length) for length in LENGTHS for name in ("decoder", "hybrid")]
    lengths = tokens_per_second(bench, {pair: (*pair, LENGTH_TOKENS // pair[1]) for pair in pairs})
    draw(results, arguments.out / "architectures.svg")
    figures = {
        "steps": arguments.steps,
        "tokens": arguments.steps * BATCH_SIZE * CONTEXT,
        "dtype": dtype,
        "threads": bench.runtime().threads,
        "models": {
            key_of(name): {
                "name": name,
                **without_identity(found),
                "by_rate": {f"{rate:g}": score for rate, score in found["by_rate"].items()},
            }
            for name, found in results.items()
        },
        "seed_difference": abs(results["decoder"]["bits_per_byte"] - results["decoder, another seed"]["bits_per_byte"]),
        "tokens_per_second": {key_of(name): speed for name, speed in speeds.items()},
        "tokens_per_second_by_context": {
            name: {str(length): lengths[name, length] for length in LENGTHS} for name in ("decoder", "hybrid")
        },
        "who_bites_whom": who_bites_whom(),
        "seconds": time.perf_counter() - started,
    }
    print(recording.save("architectures", figures, tables=tables(figures), peers=("torch",)))


if __name__ == "__main__":
    main()
