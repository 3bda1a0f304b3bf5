"""What the recipes of `examples/coding_assistant`, `support_bot` and `domain` reach, and how long they take.

    python benchmarks/specialists.py [--out FOLDER]

Each runs whole, as a user runs it, in a copy of its folder. Of the coding assistant: lines of held-out files that come back
exactly, and their bits per byte, with the text after them, in both orders, and without. Of the bot: tickets that are answered
exactly, those trained on and those held out. Of the domain: bits per byte of its held-out pages and of the general text, by
model. What is finished in the folder is not done again. Result: `specialists.json`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import bessemer.pipeline.api
import recording
from bessemer.core.environment import set_environment
from bessemer.core.progress import PlainLines
from bessemer.core.store import read_json
from bessemer.inference.engine import Engine

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = (
    "src/bessemer/posttraining",
    "src/bessemer/training",
    "src/bessemer/model",
    "src/bessemer/data",
    "src/bessemer/tokenization",
    "examples/coding_assistant",
    "examples/support_bot",
    "examples/domain",
)

ROOT = Path(__file__).resolve().parents[1]
CODE, BOT, DOMAIN = "coding_assistant", "support_bot", "domain"


def copied(out: Path) -> Path:
    """The examples in a folder of their own, beside what their recipes read of the repository."""
    examples = out / "examples"
    if not examples.exists():
        for name in (CODE, BOT, DOMAIN):
            shutil.copytree(ROOT / "examples" / name, examples / name, ignore=shutil.ignore_patterns("runs", "__pycache__"))
        shutil.copy(ROOT / "examples" / "tickets.csv", examples)
        for name in ("src", "docs"):
            (out / name).symlink_to(ROOT / name)
    return examples


def made(folder: Path) -> tuple[Path, float]:
    """The folder of a recipe's run, and its minutes."""
    run = bessemer.pipeline.api.run(str(folder / "recipe.yaml"), runs=folder / "runs", progress=PlainLines(interval=30))
    return run.folder, sum(one.artefact.manifest["seconds"] for one in run.made) / 60


def results_of(run: Path) -> dict[str, Any]:
    """What the stage `evaluate` found."""
    return read_json(run / "stages" / "evaluate" / "results.json", "results")


def module(path: Path) -> ModuleType:
    """A program of the examples."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def coding_assistant(folder: Path) -> dict[str, Any]:
    """Lines filled in by the model of `pretrain`, held-out code in bits per byte."""
    subprocess.run([sys.executable, "questions.py"], cwd=folder, check=True)
    run, minutes = made(folder)
    fill_in = module(folder / "fill_in.py")
    with Engine(run / "stages" / "pretrain" / "model") as engine:
        prompts, lines = fill_in.items_of(run, engine)
        asked = {
            name: dict(zip(("exact", "bits_per_byte"), fill_in.share_and_bits(engine, of_name, lines), strict=True))
            for name, of_name in prompts.items()
        }
    return {
        "minutes": minutes,
        "lines": len(lines),
        "asked": asked,
        "bits_per_byte": results_of(run)["bits_per_byte"]["pretrain"],
    }


def support_bot(folder: Path) -> dict[str, Any]:
    """Tickets answered exactly, and what the tuning cost in bits per byte of text."""
    run, minutes = made(folder)
    results = results_of(run)
    (task,) = results["tasks"].values()
    return {"minutes": minutes, **task["sft"], "bits_per_byte": results["bits_per_byte"]}


def domain(folder: Path) -> dict[str, Any]:
    """Bits per byte by source and model."""
    run, minutes = made(folder)
    return {
        "minutes": minutes,
        "by_source": {row["name"]: row["bits_per_byte"] for row in results_of(run)["bits_per_byte_by"]["source"]},
    }


RECIPES = {CODE: coding_assistant, BOT: support_bot, DOMAIN: domain}


def study(out: Path) -> Path:
    """All of them."""
    examples = copied(out)
    found = {}
    for name, function in RECIPES.items():
        found[name] = function(examples / name)
        print(name, json.dumps(found[name]), flush=True)
    of_code, of_domain = found[CODE], found[DOMAIN]["by_source"]
    lines = recording.table(
        [("a line of held-out code, asked for with", ""), ("comes back exactly", ".1%"), ("bits per byte", ".3f")],
        [(name, *one.values()) for name, one in of_code["asked"].items()],
    )
    models = list(of_domain["domain"])
    sources = recording.table(
        [("bits per byte of held-out text", ""), *((model, ".3f") for model in models)],
        [(source, *bits.values()) for source, bits in of_domain.items()],
    )
    return recording.save("specialists", found, tables={"lines": lines, "sources": sources}, peers=["torch"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path(tempfile.gettempdir()) / "bessemer-specialists", help="folder of the runs"
    )
    arguments = parser.parse_args()
    set_environment()
    print(study(arguments.out.resolve()))


if __name__ == "__main__":
    main()
