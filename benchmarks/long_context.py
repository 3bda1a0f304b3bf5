"""A model made to read four times further: bits per byte by position, extended or not, before and after a short training.

    python benchmarks/long_context.py                       # the quickstart's run in runs/quickstart
    python benchmarks/long_context.py --run runs/mine --factor 4 --steps 200

Needs a finished run: its pretrained model (trained on rows of T tokens) and its tokens. Each variant reads the same
held-out text in windows of factor · T tokens; the first row is the model as it is, in windows of T. The two controls say
what the training alone does: the same steps without scaling, and the same tokens in rows of T. Takes a few minutes for the
quickstart's model on two cores. Result: `long_context.json`.
"""

import argparse
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import recording
from bessemer.core.progress import Silent
from bessemer.core.store import follow
from bessemer.model.config import ModelStageConfig
from bessemer.model.stage import existing_decoder
from bessemer.model.storage.folder import load_model, save_model
from bessemer.tokenization.shards import TokenShards
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.training.pretrain import pretrain
from bessemer.training.pretrain_config import PretrainConfig

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/model", "src/bessemer/training")

# Shapes: B batch, T time.


@torch.no_grad()
def bits_by_position(model, stream, widths, context_length, buckets):
    """Bits per byte of the tokens in each of so many equal parts of a window, over the windows of a stream."""
    windows = (len(stream) - 1) // context_length
    bits, size = np.zeros(context_length), np.zeros(context_length)
    for first in range(windows):
        rows = stream[first * context_length : (first + 1) * context_length + 1]
        log_probs_TV = model(torch.from_numpy(rows[None, :-1]))[0].log_softmax(-1)
        targets_T = torch.from_numpy(rows[1:])
        bits += -log_probs_TV.gather(-1, targets_T[:, None])[:, 0].numpy() / math.log(2)
        size += widths[rows[1:]]
    return [
        float(part.sum() / weight.sum()) for part, weight in zip(np.split(bits, buckets), np.split(size, buckets), strict=True)
    ]


def tables(figures):
    """Bits per byte by position: each half of T tokens up to 2 T, the mean beyond T, and the last of all."""
    short = figures["context"]
    rows = []
    for variant in figures["variants"].values():
        parts = variant["by_position"]
        beyond = (variant["beyond"], parts[-1]) if len(parts) > 2 else (None, None)
        rows.append((variant["name"], parts[0], parts[1], *beyond))
    long = figures["factor"] * short
    columns = [
        ("Bits per byte", ""),
        (f"positions 1–{short // 2}", ".3f"),
        (f"{short // 2 + 1}–{short}", ".3f"),
        (f"beyond {short}, mean", ".3f"),
        (f"{long - short // 2 + 1:,}–{long:,}", ".3f"),
    ]
    return {"by_position": recording.table(columns, rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="folder of a finished run")
    parser.add_argument("--factor", type=int, default=4, help="how many times further")
    parser.add_argument("--steps", type=int, default=200, help="steps of continued pretraining")
    parser.add_argument("--row-tokens", type=int, default=2048, help="tokens of a batch")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak rate, a fraction of the first training's")
    parser.add_argument("--tokens", type=int, default=131_072, help="held-out tokens that are read")
    arguments = parser.parse_args()

    if not (arguments.run / "stages" / "pretrain").exists():
        recording.not_run(f"there is no finished run in {arguments.run}; `bessemer run quickstart` makes one")
    model_folder = follow(arguments.run / "stages" / "pretrain" / "model")
    tokens = follow(arguments.run / "tokens")
    original = load_model(model_folder, dtype=torch.float32)
    short = original.config.max_position_embeddings
    long = arguments.factor * short
    shards = TokenShards(tokens / "validation")
    usable = (min(arguments.tokens, shards.tokens - 1) // long) * long
    stream = shards.read(0, usable + 1).astype(np.int64)
    tokenizer = load_tokenizer(model_folder)
    widths = np.array([0 if tokenizer.is_special(id) else len(tokenizer.token_bytes(id)) for id in range(tokenizer.vocab_size)])

    yarn = {"rope_type": "yarn", "factor": float(arguments.factor)}
    with tempfile.TemporaryDirectory() as scratch:

        def start(length, scaling):
            values = {"init_from": str(model_folder), "max_position_embeddings": length}
            if scaling:
                values["rope_scaling"] = scaling
            return existing_decoder(ModelStageConfig.parse(values), model_folder, Path())

        def trained(name, length, scaling):
            folder = Path(scratch) / name
            folder.mkdir()
            save_model(start(length, scaling), folder / "before", tokenizer=model_folder)
            config = PretrainConfig(
                steps=arguments.steps,
                batch_size=max(1, arguments.row_tokens // length),
                context_length=length,
                learning_rate=arguments.learning_rate,
                dtype="float32",
                compile=False,
                evaluate_tokens=4096,
                sample_points=0,
            )
            began = time.perf_counter()
            pretrain(config, folder / "before", tokens, folder, seed=7, device="cpu", progress=Silent())
            print(f"  {name}: {arguments.steps} steps of {config.batch_size} × {length} in {time.perf_counter() - began:.0f} s")
            return load_model(folder / "model", dtype=torch.float32)

        variants = {
            "short": (f"as it is, windows of {short}", original, short),
            "unscaled": (f"as it is, windows of {long:,}", start(long, None), long),
            "yarn": (f"YaRN × {arguments.factor}, not trained", start(long, yarn), long),
            "yarn_trained": (
                f"YaRN × {arguments.factor}, {arguments.steps} steps in rows of {long:,}",
                trained("yarn", long, yarn),
                long,
            ),
            "unscaled_trained": ("no scaling, the same training", trained("unscaled", long, None), long),
            "short_trained": (f"rows of {short}, the same number of tokens", trained("short", short, None), short),
        }
        found = {}
        for key, (name, model, length) in variants.items():
            parts = bits_by_position(model, stream, widths, length, 2 * length // short)
            found[key] = {
                "name": name,
                "by_position": parts,
                "mean": float(np.mean(parts)),
                "beyond": float(np.mean(parts[2:])) if len(parts) > 2 else None,
            }

    edges = [f"–{(part + 1) * short // 2}" for part in range(2 * arguments.factor)]
    print(f"\nBits per byte by position, {usable:,} held-out tokens, context T = {short}\n")
    print(f"{'':<40}{''.join(f'{edge:>8}' for edge in edges)}{'beyond T':>10}{'all':>8}")
    for variant in found.values():
        parts = variant["by_position"]
        beyond = "–" if variant["beyond"] is None else f"{variant['beyond']:.3f}"
        cells = "".join(f"{part:8.3f}" for part in parts) + " " * 8 * (len(edges) - len(parts))
        print(f"{variant['name']:<40}{cells}{beyond:>10}{variant['mean']:8.3f}")
    figures = {
        "context": short,
        "factor": arguments.factor,
        "steps": arguments.steps,
        "held_out_tokens": usable,
        "variants": found,
    }
    print(recording.save("long_context", figures, tables=tables(figures), peers=("torch",)))


if __name__ == "__main__":
    main()
