"""Whether the best learning rate of a narrow model transfers to wider ones, with and without muP, for AdamW and Muon.

    python benchmarks/width_transfer.py [--steps 300] [--out FOLDER] [--offline]

The quickstart's corpus and a decoder of 64, 128 and 256 channels, with more heads of one size and wider feed-forwards; the
learning rate on a grid of 1, 2, 5, 10, …, over at least five values and further while the best is the outermost. Besides, the
coordinate check: how much four steps move activations at widths of 64 to 1,024.

About 25 minutes of one thread. What is finished in the folder is not done again. Draws the plot there, as
width_transfer.svg. Result: `width_transfer.json`.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import recording
from bessemer.core.hashing import derive_seed, hash_value
from bessemer.core.store import read_json, write_json
from bessemer.model.config import ModelConfig
from bessemer.model.device import is_fast
from bessemer.model.initialisation import initial_decoder
from bessemer.tokenization.shards import TokenShards
from bessemer.training.data.batches import TokenBatches
from bessemer.training.loop import DivergenceError, train
from bessemer.training.monitoring.coordinate_check import coordinate_check, growth, widened
from bessemer.training.optim.mup import scale_initial_weights, width_ratio
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.runtime import Runtime
from bessemer.training.validation import bits_per_byte
from optimizers import GRID, score, tokens

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/training", "src/bessemer/model")

SEED, BATCH_SIZE, CONTEXT, SCORED_TOKENS = 1, 4, 128, 32_768
WIDTHS, BASE = (64, 128, 256), 64
CHECKED = (64, 128, 256, 512, 1024)
#: The middle of the learning rates that a search begins with.
MIDDLES = {"adamw": 2e-3, "muon": 1e-2}
NAMES = {"adamw": "AdamW", "muon": "Muon"}
#: Learning rate of the coordinate check.
CHECK_RATES = {"adamw": 2e-3, "muon": 1e-2}


@dataclass
class Bench:
    """What all runs share."""

    train: TokenShards
    validation: TokenShards
    steps: int
    dtype: str
    out: Path

    def model(self, width: int) -> ModelConfig:
        narrow = ModelConfig(
            vocab_size=self.train.vocab_size,
            hidden_size=BASE,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=176,
            max_position_embeddings=CONTEXT,
        )
        return widened(narrow, width)

    def run(self, optimizer: str, width: int, base: int | None, rate: float) -> dict[str, Any]:
        """Train at a width and a rate, or read what it came to before."""
        if width == BASE:
            base = None  # the same
        settings = {
            "steps": self.steps,
            "batch_size": BATCH_SIZE,
            "context_length": CONTEXT,
            "optimizer": optimizer,
            "learning_rate": rate,
            "mup_base_width": base,
            "warmup_fraction": 0.1,
            "dtype": self.dtype,
            "compile": False,
            "threads": 1,
            "checkpoint_minutes": 1e6,
        }
        model = self.model(width)
        identity = hash_value(
            [settings, model.output_settings(), self.train.fingerprint, SEED, SCORED_TOKENS, torch.__version__]
        )
        folder = self.out / "models" / f"{optimizer}-{width}-{base}-{rate:g}-{self.steps}"
        if (folder / "result.json").exists() and read_json(folder / "result.json")["identity"] == identity:
            return dict(read_json(folder / "result.json"))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        config = PretrainConfig(**settings)
        decoder = initial_decoder(model, derive_seed(SEED, "model"))
        scale_initial_weights(decoder, width_ratio(config, model))
        batches = TokenBatches(self.train, batch_size=BATCH_SIZE, context_length=CONTEXT, seed=derive_seed(SEED, "batches"))
        value: float | None = None
        try:
            train(decoder, batches, config, folder, runtime=Runtime.of(config, torch.device("cpu")), seed=SEED)
            found = bits_per_byte(
                decoder.eval(), self.validation, context_length=CONTEXT, batch_size=8, max_tokens=SCORED_TOKENS
            )
            value = found.bits_per_byte
        except DivergenceError:
            pass
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        result = {"identity": identity, "bits_per_byte": value, "parameters": model.parameters()}
        write_json(folder / "result.json", result)
        print(f"{optimizer:<6} width {width:<4} base {base!s:<5} rate {rate:<7g} {score(result):.4f} bits per byte", flush=True)
        return result

    def search(self, optimizer: str, width: int, base: int | None) -> dict[float, float | None]:
        """Bits per byte by learning rate; the best has one on either side."""
        middle = GRID.index(MIDDLES[optimizer])
        runs: dict[float, dict[str, Any]] = {}
        wanted = GRID[middle - 2 : middle + 3]
        while wanted:
            runs |= {rate: self.run(optimizer, width, base, rate) for rate in wanted}
            best = GRID.index(min(runs, key=lambda rate: score(runs[rate])))
            wanted = [rate for rate in (GRID[best - 1], GRID[best + 1]) if rate not in runs]
        return {rate: runs[rate]["bits_per_byte"] for rate in sorted(runs)}


def coordinates(optimizer: str, base: int | None) -> dict[str, Any]:
    """Sizes of what four steps change, by width, and how they grow."""
    model = ModelConfig(
        vocab_size=512,
        hidden_size=BASE,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=192,
        max_position_embeddings=CONTEXT,
    )
    config = PretrainConfig(
        steps=1,
        batch_size=4,
        context_length=32,
        optimizer=optimizer,
        learning_rate=CHECK_RATES[optimizer],
        mup_base_width=base,
        dtype="float32",
        compile=False,
        threads=1,
    )
    sizes = coordinate_check(model, config, CHECKED, seeds=(0, 1))
    return {"sizes": sizes, "growth": growth(CHECKED, sizes)}


# --- results ------------------------------------------------------------------------------------------------------


def best(scores: dict[str, float | None]) -> str:
    return min(scores, key=lambda rate: float("inf") if scores[rate] is None else scores[rate])


def tables(figures: dict[str, Any]) -> dict[str, Any]:
    """For each optimizer the best rate by width, without muP and with it, and how activations grow with the width."""
    made: dict[str, Any] = {}
    for optimizer, name in NAMES.items():
        own = figures["transfer"][optimizer]
        carried = best(own[f"{BASE}_without"])
        rows = []
        for how in ("without", "with"):
            for width in WIDTHS if how == "without" else WIDTHS[1:]:  # of the base there is one model
                scores = own[f"{width}_{how}"]
                rate = best(scores)
                rows.append((f"{how} muP" if width > BASE else "", width, float(rate), scores[rate], scores.get(carried)))
        columns = [
            (name, ""),
            ("width", ",.0f"),
            ("best rate", "g"),
            ("bits per byte at it", ".4f"),
            (f"at {carried}, the best at {BASE}", ".4f"),
        ]
        made[optimizer] = recording.table(columns, rows)
        check = figures["coordinates"][optimizer]
        made[f"{optimizer}_growth"] = recording.table(
            [(f"{name}: growth with the width, 64 to 1,024", ""), ("without muP", ".2f"), ("with", ".2f")],
            [
                (activation, slope, check["with"]["growth"][activation])
                for activation, slope in check["without"]["growth"].items()
            ],
        )
    return made


def draw(record: dict[str, Any], path: Path) -> None:
    """For each optimizer: the end by learning rate at every width without and with muP, and the coordinate check."""
    import matplotlib
    from matplotlib.figure import Figure

    shades = matplotlib.colormaps["viridis"]([0.75, 0.45, 0.1])
    with matplotlib.rc_context({"svg.hashsalt": "bessemer", "font.size": 8.0}):
        figure = Figure(figsize=(11, 6), layout="constrained", facecolor="white")
        for row, optimizer in zip(figure.subplots(2, 3), MIDDLES, strict=True):
            name = NAMES[optimizer]
            for axes, how in zip(row, ("without", "with"), strict=False):
                for width, shade in zip(WIDTHS, shades, strict=True):
                    points = [(float(r), v) for r, v in record["transfer"][optimizer][f"{width}_{how}"].items() if v]
                    axes.plot(
                        *zip(*points, strict=True), color=shade, marker="o", markersize=3, linewidth=1.4, label=f"{width} wide"
                    )
                axes.set(title=f"{name}, {how} muP", xscale="log", xlabel="learning rate", ylabel="bits per byte")
            row[0].sharey(row[1])
            for how, style in (("without", "--"), ("with", "-")):
                sizes = record["coordinates"][optimizer][how]["sizes"]
                for activation, colour in (("attention 1", "#1f5f8b"), ("feed_forward 1", "#c04a12"), ("logits", "#4d7a1f")):
                    label = f"{activation}, {how} muP"
                    row[2].plot(CHECKED, sizes[activation], color=colour, linestyle=style, linewidth=1.4, label=label)
            row[2].set(title=f"{name}: change of activations in 4 steps", xscale="log", yscale="log", xlabel="width")
            for axes in row:
                axes.spines[["top", "right"]].set_visible(False)
                axes.grid(axis="y", color="#dddddd", linewidth=0.6)
                axes.legend(frameon=False, fontsize=7)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help=f"optimizer steps of {BATCH_SIZE * CONTEXT:,} tokens")
    parser.add_argument("--out", type=Path, default=Path("runs/width_transfer"), help="folder of the results")
    parser.add_argument("--offline", action="store_true", help="data of the standard library alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = tokens(arguments.out, arguments.offline)
    dtype = "bfloat16" if is_fast(torch.bfloat16, torch.device("cpu")) else "float32"
    bench = Bench(*(TokenShards(folder / split) for split in ("train", "validation")), arguments.steps, dtype, arguments.out)
    figures: dict[str, Any] = {"steps": bench.steps, "dtype": dtype, "coordinates": {}, "transfer": {}}
    for optimizer in MIDDLES:
        figures["coordinates"][optimizer] = {
            how: coordinates(optimizer, base) for how, base in (("without", None), ("with", BASE))
        }
        found: dict[str, dict[str, float | None]] = {}
        for width in WIDTHS:
            for how, base in (("without", None), ("with", BASE)):
                found[f"{width}_{how}"] = {f"{rate:g}": value for rate, value in bench.search(optimizer, width, base).items()}
        figures["transfer"][optimizer] = found
    draw(figures, arguments.out / "width_transfer.svg")
    print(recording.save("width_transfer", figures, tables=tables(figures), peers=("torch",)))


if __name__ == "__main__":
    main()
