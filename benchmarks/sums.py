"""A small model learns sums from rewards alone: GRPO and PPO beside supervised tuning, for as many minutes.

    python benchmarks/sums.py [--seeds 3] [--methods GRPO PPO SFT] [--out FOLDER]    # about an hour on two cores

The recipes of `examples/arithmetic`: a model of the quickstart's size reads sums until it writes numbers and few of them are
right; then it is trained by rewards of its own answers (`recipe.yaml`, `ppo.yaml`), or told the answers (`tuning.yaml`). Asked
are the 500 sums of the task `sums_held_out`, of which no stage has seen either order, greedily: before, and after. Nothing is
timed against anything, but each training is to end within ten minutes. What is finished in the folder is not done again.

Result: `sums.json`, and the curves `docs/images/sums.svg`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import recording
from bessemer.core.environment import set_environment

set_environment()  # before PyTorch reads it

from bessemer.core.metrics import read_metrics  # noqa: E402
from bessemer.core.progress import progress_for_terminal  # noqa: E402
from bessemer.evaluation.task_answerers import answers  # noqa: E402
from bessemer.inference.engine import Engine  # noqa: E402
from bessemer.pipeline.api import run  # noqa: E402
from bessemer.tasks.config import TaskOptions  # noqa: E402
from bessemer.tasks.questions import GenerationTask  # noqa: E402
from bessemer.tasks.registry import find_tasks  # noqa: E402

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = (
    "src/bessemer/posttraining",
    "src/bessemer/training",
    "src/bessemer/model",
    "src/bessemer/inference",
    "examples/arithmetic",
)

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "arithmetic"
#: Method → its recipe, its stage, and how it is asked.
METHODS = {"GRPO": ("recipe.yaml", "rl", False), "PPO": ("ppo.yaml", "rl", False), "SFT": ("tuning.yaml", "sft", True)}
TASK = "sums_held_out"
#: What the model must be like before, and after.
MOST_BEFORE, WELL_FORMED = 0.3, 0.95
#: Steps of pretraining that are tried.
LENGTHS = (128, 116, 104, 92, 80)
_NUMBER = re.compile(r"\s*\d+\s*")


def asked(model: Path, *, chat: bool) -> dict[str, float]:
    """How many of the held-out sums a model adds rightly, greedily, and how many answers are a number and nothing else."""
    (task,) = find_tasks([TASK], TaskOptions(chat=chat))
    assert isinstance(task, GenerationTask)
    questions = task.questions()
    outcomes = [outcome for batch in answers(Engine(model, device="cpu"), task, questions) for outcome in batch]
    headline = task.headline(questions[0].form)
    return {
        "right": sum(outcome.scores[headline] for outcome in outcomes) / len(outcomes),
        "well_formed": sum(bool(_NUMBER.fullmatch(outcome.answer)) for outcome in outcomes) / len(outcomes),
        "questions": len(outcomes),
    }


def base_of(seed: int) -> tuple[list[str], dict[str, Any]]:
    """The longest pretraining of a seed that leaves most sums wrong, as overrides, and what its model answers.

    A few steps decide between a model that rarely adds right and one that mostly does, and which these are depends on the seed.
    """
    for steps in LENGTHS:
        overrides = [f"seed={seed}", f"pretrain.steps={steps}"]
        done = ran("recipe.yaml", overrides, f"base-{seed}-{steps}", until="pretrain")
        found = asked(done["pretrain"] / "model", chat=False) | {"steps": steps}
        print(f"seed {seed}: {found}", flush=True)
        if found["right"] <= MOST_BEFORE and found["well_formed"] >= WELL_FORMED:
            return overrides, found
    raise SystemExit(f"seed {seed}: no base model is as it is to be")


def ran(recipe: str, overrides: list[str], name: str, until: str | None = None) -> dict[str, Path]:
    """The folders of a run's stages."""
    progress = progress_for_terminal()
    return run(recipe, overrides, name=name, until=until, allow_code=True, progress=progress).run.stages()


def one_seed(seed: int, methods: Sequence[str]) -> dict[str, Any]:
    """The base model of a seed, and what each method makes of it."""
    overrides, base = base_of(seed)
    found: dict[str, Any] = {"seed": seed, "base": base}
    for method in methods:
        recipe, stage, chat = METHODS[method]
        done = ran(recipe, overrides, f"{method.lower()}-{seed}")
        lines = list(read_metrics(done[stage] / "metrics.jsonl"))
        curves = {
            key: [[line["step"], line[key]] for line in lines if line.get(key) is not None]
            for key in ("reward", "kl", "completion_tokens", "entropy", f"task/{TASK}")
        }
        found[method] = asked(done[stage] / "model", chat=chat) | {
            "minutes": lines[-1]["seconds"] / 60,
            "updates": lines[-1]["step"],
            "curves": {key: values for key, values in curves.items() if values},
        }
        print(seed, method, {key: value for key, value in found[method].items() if key != "curves"}, flush=True)
    return found


def draw(seeds: list[dict[str, Any]], path: Path) -> None:
    """Reward, divergence, length and entropy by update, a line of each seed."""
    import matplotlib
    from matplotlib.figure import Figure

    shown = {
        "reward": "reward",
        "kl": "KL to the base model, nats a token",
        "completion_tokens": "tokens",
        "entropy": "entropy, nats",
    }
    colours = {"GRPO": "#3366cc", "PPO": "#cc5533"}
    with matplotlib.rc_context({"svg.hashsalt": "bessemer", "font.size": 8.0}):
        figure = Figure(figsize=(12, 3), layout="constrained", facecolor="white")
        for axes, (key, label) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
            for method, colour in colours.items():
                for seed in seeds:
                    if values := seed.get(method, {}).get("curves", {}).get(key):
                        axes.plot(*zip(*values, strict=True), color=colour, linewidth=0.9, alpha=0.7)
                axes.plot([], [], color=colour, label=method)
            axes.set(title=label, xlabel="update")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.legend(frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument(
        "--out", type=Path, default=Path(tempfile.gettempdir()) / "bessemer-sums", help="folder whose runs are used"
    )
    options = parser.parse_args()
    shutil.copytree(EXAMPLE, options.out, dirs_exist_ok=True)
    sys.argv[0] = str(Path(sys.argv[0]).resolve())  # the record names the command by where this file lies
    os.chdir(options.out)
    seeds = [one_seed(seed, options.methods) for seed in range(1, options.seeds + 1)]
    kinds = ("base", *options.methods)
    rows = [
        [
            kind,
            median(seed[kind]["right"] for seed in seeds),
            *(seed[kind]["right"] for seed in seeds),
            min(seed[kind]["well_formed"] for seed in seeds),
            None if kind == "base" else max(seed[kind]["minutes"] for seed in seeds),
        ]
        for kind in kinds
    ]
    columns = [
        ("", ""),
        ("held-out sums right, median", ".1%"),
        *((f"seed {seed['seed']}", ".1%") for seed in seeds),
        ("well-formed, least", ".1%"),
        ("minutes, most", ".1f"),
    ]
    figures = {"seeds": seeds, "median": {kind: median(seed[kind]["right"] for seed in seeds) for kind in kinds}}
    print(recording.save("sums", figures, tables={"right": recording.table(columns, rows)}))
    draw(seeds, Path(__file__).resolve().parents[1] / "docs" / "images" / "sums.svg")


if __name__ == "__main__":
    main()
