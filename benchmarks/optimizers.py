"""Optimizers side by side on the quickstart's corpus, each at its best learning rate: AdamW, SGD, Lion, Adafactor and Muon.

    python benchmarks/optimizers.py [--steps 400] [--out FOLDER] [--offline]

One small decoder, the same tokens in the same order, one knob: the learning rate, on a grid of 1, 2, 5, 10, …, over at least
five values and further while the best is the outermost. Then Muon beside AdamW over three seeds, both tuned, with the steps
that Muon needs for AdamW's loss; and why SGD loses: the loss by how rare a token is, optimizers between both, and gradients by
kind.

About 30 minutes of one thread. What is finished in the folder is not done again. Draws the plot there, as optimizers.svg.
Result: `optimizers.json`.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
import statistics
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bessemer.pipeline.api
import optimizers_explained as explained
import recording
from bessemer.core.hashing import derive_seed, hash_value
from bessemer.core.metrics import read_metrics
from bessemer.core.progress import PlainLines
from bessemer.core.store import read_json, write_json
from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.model.initialisation import initial_decoder
from bessemer.tokenization.shards import TokenShards
from bessemer.training.data.batches import TokenBatches
from bessemer.training.loop import DivergenceError, train
from bessemer.training.optim.weight_averaging import MovingAverage, mean_weights
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.runtime import Runtime
from bessemer.training.trainer import Trainer
from bessemer.training.validation import bits_per_byte

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/training", "src/bessemer/model")

BATCH_SIZE, CONTEXT, WARMUP, VALIDATIONS = 4, 128, 0.1, 20
#: Tokens of the validations on the way, and of the last one.
CURVE_TOKENS, FINAL_TOKENS = 4096, 32_768
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 168,
    "max_position_embeddings": CONTEXT,
}
SEEDS = (1, 2, 3)
#: Of three seeds.
DUEL = ("Muon", "AdamW", "AdamW, matrices at a fifth")
#: Of the moving averages; and how many of the last checkpoints are averaged, and how many steps lie between them.
DECAYS, LAST, APART = (0.9, 0.95, 0.98, 0.99), 5, 10
#: Learning rates that a search may try.
GRID = [float(f"{digit}e{power}") for power in range(-7, 3) for digit in (1, 2, 5)]
#: Of Muon's shorter runs, in shares of the steps.
SHARES = (0.3, 0.4, 0.5, 0.6, 0.8)


@dataclass(frozen=True)
class Arm:
    """An optimizer, and the middle of the five learning rates of `GRID` that its search begins with.

    matrices: the learning rate of the matrices inside blocks, as a share of the others'.
    """

    settings: dict[str, Any]
    middle: float
    matrices: float | None = None


ARMS = {
    "Muon": Arm({"optimizer": "muon"}, 1e-2),
    "AdamW": Arm({"optimizer": "adamw"}, 1e-3),
    "Lion": Arm({"optimizer": "lion", "beta2": 0.98}, 2e-4),
    "Adafactor": Arm({"optimizer": "adafactor"}, 1e-1),
    "SGD, Nesterov": Arm({"optimizer": "sgd", "momentum": 0.95, "nesterov": True}, 0.1),
    "SGD, momentum": Arm({"optimizer": "sgd", "momentum": 0.95, "nesterov": False}, 0.1),
    "SGD": Arm({"optimizer": "sgd", "momentum": 0.0}, 2.0),
}
#: Optimizers that explain something.
BETWEEN = {
    "AdamW, matrices at a fifth": Arm({"optimizer": "adamw"}, 1e-2, matrices=0.2),
    "one scale a tensor": Arm({"optimizer": "optimizers_explained.py:scale_per_tensor"}, 2e-3),
    "and one a token": Arm({"optimizer": "optimizers_explained.py:scale_per_token"}, 2e-3),
}
LABELS = {"one scale a tensor": "Adam, one scale a tensor", "and one a token": "Adam, and one a token"}
#: Whose loss is shown by how rare tokens are.
BY_FREQUENCY = ("SGD, momentum", "one scale a tensor", "and one a token", "AdamW", "Muon")


@dataclass
class Bench:
    """What all runs share, and the record that grows with them."""

    train: TokenShards
    validation: TokenShards
    steps: int
    out: Path
    counts_V: Tensor

    def settings(self, name: str, rate: float, steps: int) -> dict[str, Any]:
        """What differs from a run's defaults."""
        arm = (ARMS | BETWEEN)[name]
        return {
            "steps": steps,
            "batch_size": BATCH_SIZE,
            "context_length": CONTEXT,
            "learning_rate": rate,
            "weight_decay": 0.0,  # SGD's is coupled, and wants a value of its own
            "warmup_fraction": WARMUP,
            "dtype": "float32",
            "compile": False,
            "threads": 1,
            "checkpoint_minutes": 1e6,
            **arm.settings,
            **({} if arm.matrices is None else {"matrix_learning_rate": arm.matrices * rate}),
        }

    def run(self, name: str, rate: float, seed: int = SEEDS[0], steps: int | None = None) -> dict[str, Any]:
        """Train with an optimizer, or read what it came to before: the curve, and figures of the end."""
        steps = steps or self.steps
        settings = self.settings(name, rate, steps)
        data = [self.train.fingerprint, self.validation.fingerprint, CURVE_TOKENS, FINAL_TOKENS, VALIDATIONS]
        identity = hash_value([settings, SHAPE, *data, seed, torch.__version__])
        folder = self.out / "models" / re.sub(r"[^\w.-]+", "-", f"{name} {rate:g} {seed} {steps}")
        if (folder / "result.json").exists() and read_json(folder / "result.json")["identity"] == identity:
            return dict(read_json(folder / "result.json"))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        model = initial_decoder(ModelConfig(vocab_size=self.train.vocab_size, **SHAPE), derive_seed(seed, "model"))
        try:
            figures = self._train(model, PretrainConfig(**settings), folder, seed)
        except DivergenceError:
            figures = {"curve": [], "bits_per_byte": None}
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        result = {"identity": identity, "optimizer": name, "learning_rate": rate, "seed": seed, "steps": steps, **figures}
        write_json(folder / "result.json", result)
        print(f"{name:<20} rate {rate:<9g} seed {seed} {steps} steps: {score(result):.4f} bits per byte", flush=True)
        return result

    def _train(self, model: Decoder, config: PretrainConfig, folder: Path, seed: int) -> dict[str, Any]:
        assert config.steps is not None
        runtime, steps = Runtime.of(config, torch.device("cpu")), config.steps

        def on_step_end(finished: int, trainer: Trainer) -> dict[str, float]:
            if finished % max(1, self.steps // VALIDATIONS) and finished != steps:
                return {}
            with runtime.evaluating(model):
                return {"bits_per_byte": self.score(model, FINAL_TOKENS if finished == steps else CURVE_TOKENS)}

        batches = TokenBatches(self.train, batch_size=BATCH_SIZE, context_length=CONTEXT, seed=derive_seed(seed, "batches"))
        here = Path(__file__).parent
        train(model, batches, config, folder, runtime=runtime, seed=seed, on_step_end=on_step_end, folder=here)
        points = [
            (record["step"], record["bits_per_byte"])
            for record in read_metrics(folder / "metrics.jsonl")
            if "bits_per_byte" in record
        ]
        windows = explained.held_out_windows(self.validation, FINAL_TOKENS // CONTEXT, CONTEXT)
        model.eval()
        figures = {"by_frequency": explained.loss_by_frequency(model, windows, self.counts_V)}
        if config.optimizer == "adamw":
            figures["gradients"] = explained.gradient_statistics(model, windows, self.counts_V)
        return {"curve": points, "bits_per_byte": points[-1][1], **figures}

    def averages(self, rate: float) -> dict[str, Any]:
        """What averages of the weights are worth when Muon's rate never falls: bits per byte of the end, of moving averages by
        their decay, and of the mean of the last checkpoints."""
        folder = self.out / "models" / f"averages-{rate:g}-{self.steps}"
        if (folder / "result.json").exists():
            return dict(read_json(folder / "result.json"))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        settings = self.settings("Muon", rate, self.steps) | {"decay_fraction": 0.0}
        config, runtime = PretrainConfig(**settings), Runtime.of(PretrainConfig(**settings), torch.device("cpu"))
        model = initial_decoder(ModelConfig(vocab_size=self.train.vocab_size, **SHAPE), derive_seed(SEEDS[0], "model"))
        moving = {decay: MovingAverage(model, decay) for decay in DECAYS}
        kept: list[dict[str, Tensor]] = []

        def on_step_end(finished: int, trainer: Trainer) -> dict[str, float]:
            for average in moving.values():
                average.update()
            if finished > self.steps - APART * LAST and (self.steps - finished) % APART == 0:
                kept.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
            return {}

        seed = derive_seed(SEEDS[0], "batches")
        batches = TokenBatches(self.train, batch_size=BATCH_SIZE, context_length=CONTEXT, seed=seed)
        train(model, batches, config, folder, runtime=runtime, seed=SEEDS[0], on_step_end=on_step_end)
        scores: dict[str, Any] = {"weights": self.score(model.eval(), FINAL_TOKENS), "ema": {}}
        for decay, average in moving.items():
            with average.in_place():
                scores["ema"][str(decay)] = self.score(model, FINAL_TOKENS)
        model.load_state_dict(mean_weights(kept))
        scores["checkpoints"] = self.score(model, FINAL_TOKENS)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        write_json(folder / "result.json", scores)
        return scores

    def score(self, model: Decoder, tokens: int) -> float:
        found = bits_per_byte(model, self.validation, context_length=CONTEXT, batch_size=BATCH_SIZE, max_tokens=tokens)
        return found.bits_per_byte

    def search(self, name: str, seeds: tuple[int, ...] = SEEDS[:1]) -> dict[float, list[dict[str, Any]]]:
        """The runs over all seeds by learning rate, in order; the best mean has a rate on either side, and there are five."""
        middle = min(range(len(GRID)), key=lambda place: abs(GRID[place] - (ARMS | BETWEEN)[name].middle))
        runs: dict[float, list[dict[str, Any]]] = {}
        wanted = GRID[middle - 2 : middle + 3]
        while wanted:
            runs |= {rate: [self.run(name, rate, seed) for seed in seeds] for rate in wanted}
            best = GRID.index(best_rate(runs))
            wanted = [rate for rate in (GRID[best - 1], GRID[best + 1]) if rate not in runs]
        return dict(sorted(runs.items()))


def score(result: dict[str, Any]) -> float:
    """Bits per byte; infinite where the run diverged."""
    value = result["bits_per_byte"]
    return math.inf if value is None else value


def mean_score(results: list[dict[str, Any]]) -> float:
    return statistics.fmean(score(result) for result in results)


def best_rate(runs: dict[float, list[dict[str, Any]]]) -> float:
    return min(runs, key=lambda rate: mean_score(runs[rate]))


def steps_to_reach(curve: list[tuple[float, float]], target: float) -> float | None:
    """Where a curve of (steps, bits per byte) first reaches a value, between its points in a straight line."""
    for (before, worse), (after, value) in pairwise(curve):
        if value <= target:
            return before + (after - before) * (worse - target) / (worse - value) if worse > target else before
    return None


def muon_against_adamw(bench: Bench) -> dict[str, Any]:
    """Muon and AdamW tuned over three seeds, AdamW also with a lower rate for matrices, as Muon's are; and Muon in fewer steps,
    with a warm-up and a decay of their own."""
    searched = {name: bench.search(name, SEEDS) for name in DUEL}
    rates = {name: best_rate(runs) for name, runs in searched.items()}
    ends = {name: mean_score(searched[name][rate]) for name, rate in rates.items()}
    curve = []
    for share in SHARES:
        steps = round(share * bench.steps)
        curve.append((steps, mean_score([bench.run("Muon", rates["Muon"], seed, steps) for seed in SEEDS])))
    curve.append((bench.steps, ends["Muon"]))
    return {
        "optimizers": {
            key_of(name): {
                "name": name,
                "learning_rate": rates[name],
                "by_seed": [finite(score(run)) for run in searched[name][rates[name]]],
                "mean": ends[name],
                "muon_needs_steps": bench.steps if name == "Muon" else steps_to_reach(curve, ends[name]),
                "by_rate": {f"{rate:g}": [finite(score(run)) for run in found] for rate, found in searched[name].items()},
            }
            for name in DUEL
        },
        "muon_by_steps": curve,
    }


def finite(value: float) -> float | None:
    """A score as JSON holds it: null where the run diverged."""
    return value if math.isfinite(value) else None


# --- results ------------------------------------------------------------------------------------------------------


def key_of(name: str) -> str:
    """A name as a key of the result."""
    return re.sub(r"\W+", "_", name.lower())


def tables(figures: dict[str, Any]) -> dict[str, Any]:
    """The optimizers at their best rates; Muon beside AdamW; averages of weights; and what explains SGD."""
    optimizers, duel = figures["optimizers"], figures["muon_against_adamw"]["optimizers"]
    chosen = [found for found in optimizers.values() if found["name"] not in LABELS]
    ranked = sorted(chosen, key=lambda found: found["bits_per_byte"])
    tried = {found["name"]: [float(rate) for rate in found["by_rate"]] for found in ranked}
    rows = [
        (name := found["name"], found["learning_rate"], min(tried[name]), max(tried[name]), found["bits_per_byte"])
        for found in ranked
    ]
    averages = figures["averages"]
    averaged = [
        ("the weights in the end", averages["weights"]),
        *((f"`ema` {decay}", value) for decay, value in averages["ema"].items()),
        (f"mean of {LAST} checkpoints, {APART} steps apart", averages["checkpoints"]),
        ("for comparison: the rate falls over the last 30 %", optimizers["muon"]["bits_per_byte"]),
    ]
    by_frequency = [
        (LABELS.get(name, name), found["bits_per_byte"], *found["by_frequency"])
        for name in BY_FREQUENCY
        if (found := optimizers[key_of(name)])
    ]
    fifths = [f"fifth {number}" for number in range(1, 1 + explained.PARTS)]
    return {
        "best": recording.table(
            [
                ("", ""),
                ("best rate", "g"),
                ("lowest tried", "g"),
                ("highest tried", "g"),
                ("bits per byte", ".3f"),
            ],
            rows,
        ),
        "muon_and_adamw": recording.table(
            [
                ("", ""),
                ("best rate", "g"),
                *((f"seed {seed}", ".3f") for seed in SEEDS),
                ("mean bits per byte", ".3f"),
                ("Muon gets there in steps", ".0f"),
            ],
            [
                (found["name"], found["learning_rate"], *found["by_seed"], found["mean"], found["muon_needs_steps"])
                for found in duel.values()
            ],
        ),
        "averages": recording.table([("", ""), ("bits per byte", ".3f")], averaged),
        "by_frequency": recording.table(
            [("", ""), ("bits per byte", ".3f"), *((fifth, ".2f") for fifth in fifths)], by_frequency
        ),
        "gradients": recording.table(
            [
                ("gradient of", ""),
                ("size of the mean", ".1e"),
                ("noise of a row", ".1e"),
                ("kurtosis, 3 for a normal distribution", ".0f"),
            ],
            [(row["kind"], row["size"], row["noise"], row["kurtosis"]) for row in figures["gradients"]],
        ),
    }


def draw(record: dict[str, Any], path: Path) -> None:
    """Three panels: the curves at the best rates, the end by learning rate, the end by how rare a token is."""
    import matplotlib
    from matplotlib.figure import Figure

    colours = dict(zip([*ARMS, *BETWEEN], matplotlib.colormaps["tab10"].colors, strict=False))
    with matplotlib.rc_context({"svg.hashsalt": "bessemer", "font.size": 8.0}):
        figure = Figure(figsize=(12, 4), layout="constrained", facecolor="white")
        curves, rates, rare = figure.subplots(1, 3)
        for name in ARMS:
            found = record["optimizers"][key_of(name)]
            steps, values = zip(*found["curve"], strict=True)
            curves.plot(steps, values, color=colours[name], linewidth=1.4, label=f"{name} {found['bits_per_byte']:.2f}")
            tried = [(float(rate), value) for rate, value in found["by_rate"].items() if value]
            rates.plot(*zip(*tried, strict=True), color=colours[name], linewidth=1.4, marker="o", markersize=3, label=name)
        for name in BY_FREQUENCY:
            values = record["optimizers"][key_of(name)]["by_frequency"]
            rare.plot(
                range(1, 1 + len(values)),
                values,
                color=colours[name],
                linewidth=1.4,
                marker="o",
                markersize=3,
                label=LABELS.get(name, name),
            )
        curves.set(title="At the best learning rate", xlabel="step", ylabel="bits per byte, held out")
        rates.set(title="At the end, by learning rate", xscale="log", xlabel="learning rate")
        rare.set(
            title="At the end, by how rare a token is", xlabel="fifth of the targets, commonest first", ylabel="loss, nats"
        )
        rare.set_xticks(range(1, 1 + explained.PARTS))
        for axes in (curves, rates, rare):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        curves.legend(frameon=False)
        rare.legend(frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def tokens(out: Path, offline: bool) -> Path:
    """The quickstart's tokens: a vocabulary of 4,096 by BPE."""
    overrides = {"collect": [{"source": "python_docs"}]} if offline else {}
    progress = PlainLines(interval=30)
    made = bessemer.pipeline.api.run(
        "quickstart", overrides, name="data", runs=out / "runs", until="tokenize", progress=progress
    )
    return made.folder / "tokens"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help=f"optimizer steps of {BATCH_SIZE * CONTEXT:,} tokens")
    parser.add_argument("--out", type=Path, default=Path("runs/optimizers"), help="folder of the results")
    parser.add_argument("--offline", action="store_true", help="data of the standard library alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = tokens(arguments.out, arguments.offline)
    shards = [TokenShards(folder / split) for split in ("train", "validation")]
    bench = Bench(*shards, arguments.steps, arguments.out, explained.token_counts(shards[0]))
    figures: dict[str, Any] = {
        "steps": bench.steps,
        "tokens_per_step": BATCH_SIZE * CONTEXT,
        "vocab_size": shards[0].vocab_size,
        "optimizers": {},
    }
    for name in (*ARMS, *BETWEEN):
        runs = {rate: found[0] for rate, found in bench.search(name).items()}
        best = min(runs.values(), key=score)
        figures["optimizers"][key_of(name)] = {
            "name": name,
            **{key: value for key, value in best.items() if key not in ("identity", "optimizer", "gradients")},
            "by_rate": {f"{rate:g}": run["bits_per_byte"] for rate, run in runs.items()},
        }
        if name == "AdamW":
            figures["gradients"] = best["gradients"]
    figures["muon_against_adamw"] = muon_against_adamw(bench)
    muon = figures["muon_against_adamw"]["optimizers"]["muon"]
    figures["averages"] = bench.averages(muon["learning_rate"])
    draw(figures, arguments.out / "optimizers.svg")
    print(recording.save("optimizers", figures, tables=tables(figures), peers=("torch",)))


if __name__ == "__main__":
    main()
