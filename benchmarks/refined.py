"""Does refining pay? The same model trained on the quickstart's raw corpus and on the refined one, tokens being equal.

    python benchmarks/refined.py                            # runs/refined, three seeds, goes on where it was interrupted
    python benchmarks/refined.py --steps 150 --seeds 1      # quicker

Raw is what `collect` found, with nothing edited or dropped; refined is what the recipe keeps of it. One tokenizer (the refined
corpus's), one order of work, one optimizer. The score is bits per byte of the refined documents of packages that neither has
read. A third arm is a model about twice the size on the raw corpus, at equal compute: as many steps fewer as it costs more.
Result: `refined.json`.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

import bessemer.pipeline.api
import recording
from bessemer.core.hashing import derive_seed, hash_value
from bessemer.core.progress import PlainLines
from bessemer.core.store import read_json, write_json
from bessemer.model.config import ModelConfig
from bessemer.model.initialisation import initial_decoder
from bessemer.model.storage.folder import load_model, save_model
from bessemer.tokenization.shards import TokenShards
from bessemer.training.pretrain import pretrain
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.validation import bits_per_byte

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/data", "src/bessemer/training", "src/bessemer/model")

CONTEXT, BATCH_SIZE, SCORED_TOKENS = 256, 8, 131_072
RAW = {"clean.edit": [], "clean.score": [], "deduplicate": [], "select": {"keep": "all", "languages": []}}
SMALL = {"hidden_size": 128, "intermediate_size": 384}
LARGE = {"hidden_size": 208, "intermediate_size": 624, "num_attention_heads": 4, "num_key_value_heads": 2}
ARMS = {"refined": ("refined", SMALL), "raw": ("raw", SMALL), "raw, twice the size": ("raw", LARGE)}


def corpora(out: Path) -> dict[str, Path]:
    """Token folders of both corpora, with the refined one's tokenizer."""
    progress = PlainLines(interval=30)
    refined = bessemer.pipeline.api.run("quickstart", name="refined", runs=out / "runs", until="tokenize", progress=progress)
    tokenizer = {"tokenize": {"tokenizer": str((refined.folder / "tokenizer").resolve())}}
    raw = bessemer.pipeline.api.run(
        "quickstart", RAW | tokenizer, name="raw", runs=out / "runs", until="tokenize", progress=progress
    )
    return {"refined": refined.folder / "tokens", "raw": raw.folder / "tokens"}


def train(out: Path, name: str, tokens: dict[str, Path], steps: int, seed: int) -> dict[str, Any]:
    """One arm from one seed, or what it came to before."""
    corpus, shape = ARMS[name]
    shards, held_out = TokenShards(tokens[corpus] / "train"), TokenShards(tokens["refined"] / "validation")
    sizes = {"vocab_size": shards.vocab_size, "max_position_embeddings": CONTEXT}
    small, config = ModelConfig(**sizes, **SMALL), ModelConfig(**sizes, **shape)
    steps = round(steps * small.flops_per_token(CONTEXT) / config.flops_per_token(CONTEXT))
    settings = PretrainConfig(
        steps=steps,
        batch_size=BATCH_SIZE,
        context_length=CONTEXT,
        optimizer="muon",
        learning_rate=1e-2,
        matrix_learning_rate=5e-3,
        evaluate_tokens=4096,
        sample_points=0,
        compile=False,
        dtype="float32",  # on one thread of a CPU half as fast again as bfloat16
    )
    identity = hash_value(
        [settings.output_settings(), config.output_settings(), shards.fingerprint, held_out.fingerprint, seed]
    )
    folder = out / "models" / f"{name.replace(', ', '-').replace(' ', '-')}-{steps}-{seed}"
    if (folder / "result.json").exists() and read_json(folder / "result.json")["identity"] == identity:
        return dict(read_json(folder / "result.json"))
    folder.mkdir(parents=True, exist_ok=True)
    save_model(
        initial_decoder(config, derive_seed(seed, "model")), folder / "before", tokenizer=tokens["refined"].parent / "tokenizer"
    )
    pretrain(settings, folder / "before", tokens[corpus], folder, seed=seed, device="cpu", progress=PlainLines(interval=30))
    model = load_model(folder / "model", dtype=torch.float32)
    score = bits_per_byte(model, held_out, context_length=CONTEXT, batch_size=BATCH_SIZE, max_tokens=SCORED_TOKENS)
    result = {
        "identity": identity,
        "bits_per_byte": score.bits_per_byte,
        "steps": steps,
        "tokens": steps * BATCH_SIZE * CONTEXT,
        "parameters": config.parameters(),
        "corpus_tokens": shards.tokens,
    }
    write_json(folder / "result.json", result)
    return result


def tables(figures: dict[str, Any]) -> dict[str, Any]:
    rows = [
        (row["corpus"], row["parameters"], row["steps"], row["corpus_tokens"], *row["by_seed"], row["mean"])
        for row in figures.values()
    ]
    seeds = range(1, 1 + len(next(iter(figures.values()))["by_seed"]))
    columns = [
        ("corpus", ""),
        ("weights", ",.0f"),
        ("steps", ",.0f"),
        ("tokens in it", ",.0f"),
        *((f"seed {seed}", ".4f") for seed in seeds),
        ("mean", ".4f"),
    ]
    return {"scores": recording.table(columns, rows)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of 2,048 tokens of the small model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/refined"))
    arguments = parser.parse_args()
    tokens = corpora(arguments.out)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
    for seed in range(1, arguments.seeds + 1):
        for name in ARMS:
            runs[name].append(train(arguments.out, name, tokens, arguments.steps, seed))
            print(f"{name:<22} seed {seed}: {runs[name][-1]['bits_per_byte']:.4f} bits per byte", flush=True)
    figures = {}
    for name, found in runs.items():
        scores = [run["bits_per_byte"] for run in found]
        figures[re.sub(r"\W+", "_", name)] = {
            "corpus": name,
            **{key: found[0][key] for key in ("parameters", "steps", "tokens", "corpus_tokens")},
            "by_seed": scores,
            "mean": statistics.mean(scores),
            "spread_of_seeds": max(scores) - min(scores),
        }
    print(recording.save("refined", figures, tables=tables(figures), peers=("torch",)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
