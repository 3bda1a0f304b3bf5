"""How far a proxy can be trusted: a policy is trained against a reward model, and judged by what taught the reward model.

    python benchmarks/overoptimisation.py [--out FOLDER] [--seed 1]    # some twenty minutes on two cores

Gao et al. 2022, with sums for the task. The *gold* reward of an answer is 1 where the sum is right. The base model of
`examples/arithmetic` answers sums, gold says which of its answers are right, and a right and a wrong one of a sum are a pair:
from 100, 400 and 1,600 pairs reward models learn, the *proxies*. Each is then what a policy is optimised for, in two ways: the
best of n samples of the base model, and GRPO with (nearly) no weight on the divergence. Gold is watched and never optimised.
Nothing is timed. What is finished in the folder is not done again.

Result: `overoptimisation.json`, and the curves `docs/images/overoptimisation.svg`: both rewards over the distance from the
base model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import recording
from bessemer.core.environment import set_environment

set_environment()  # before PyTorch reads it

from bessemer.core.metrics import read_metrics  # noqa: E402
from bessemer.core.progress import progress_for_terminal  # noqa: E402
from bessemer.core.store import read_json, write_json  # noqa: E402
from bessemer.inference.engine import Engine, SamplingParams  # noqa: E402
from bessemer.posttraining.rewards.config import RewardConfig  # noqa: E402
from bessemer.posttraining.rewards.model_based import RewardModel  # noqa: E402
from bessemer.posttraining.rewards.stage import reward  # noqa: E402
from bessemer.posttraining.rl.config import RLConfig  # noqa: E402
from bessemer.posttraining.rl.stage import rl  # noqa: E402
from bessemer.tasks.questions import GenerationQuestion, GenerationTask  # noqa: E402
from bessemer.tasks.registry import find_tasks  # noqa: E402
from sums import EXAMPLE, base_of, ran  # noqa: E402

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = (
    "src/bessemer/posttraining",
    "src/bessemer/training",
    "src/bessemer/model",
    "src/bessemer/inference",
    "examples/arithmetic",
)

#: Pairs that a proxy learns from.
PAIRS = (100, 400, 1600)
#: Samples of a sum, to make pairs of, and to take the best of.
ASKED, BEST_OF = 8, 256
#: Sums of which the best of n is taken.
QUESTIONS = 200
SAMPLING = {"temperature": 1.0, "max_tokens": 8}
REWARD = {
    "validation_share": 0.1,
    "epochs": 8,
    "batch_size": 8,
    "context_length": 64,
    "optimizer": "muon",
    "learning_rate": 2e-3,
    "dtype": "float32",
    "compile": False,
    "diagnostics_every": 0,
    "evaluate_every": 1000,
}
RL = {
    "data": ["sums"],
    "validation_share": 0,
    "algorithm": "grpo",
    "steps": 250,
    "group_size": 4,
    "batch_size": 256,
    "max_tokens": 8,
    "context_length": 32,
    "optimizer": "muon",
    "learning_rate": 1e-3,
    "decay_fraction": 0.2,
    "warmup_steps": 10,
    "beta": 1e-4,  # so little that the divergence is only measured
    "dtype": "float32",
    "compile": False,
    "diagnostics_every": 0,
}


Value = TypeVar("Value")


def task_of(name: str) -> GenerationTask:
    """A task of sums."""
    (task,) = find_tasks([name])
    assert isinstance(task, GenerationTask)
    return task


def sampled(
    model: Path, task: GenerationTask, questions: Sequence[GenerationQuestion], number: int, seed: int
) -> list[list[str]]:
    """`number` answers of a model to each question."""
    engine = Engine(model, device="cpu")
    params = SamplingParams.parse({**SAMPLING, "stop": list(task.generation.stop), "n": number, "seed": seed}, "sampling")
    found: list[list[str]] = []
    with progress_for_terminal().task("sample", total=len(questions), unit="sums") as bar:
        for some in parts(questions, 32):
            answered = engine.generate([str(question.context) for question in some], params)
            found += [[one.text, *(other.text for other in one.others)] for one in answered]
            bar.advance(len(some))
    return found


def parts(values: Sequence[Value], size: int) -> list[Sequence[Value]]:
    """The values, `size` at a time."""
    return [values[start : start + size] for start in range(0, len(values), size)]


def gold_of(task: GenerationTask, question: GenerationQuestion, texts: Sequence[str]) -> list[float]:
    """1 of each answer that is right, 0 of the others."""
    headline = task.headline(question.form)
    return [task.judge(question, [text]).scores[headline] for text in texts]


# --- the proxies ----------------------------------------------------------------------------------------------------


def pairs_of(base: Path, seed: int) -> list[dict[str, str]]:
    """A right and a wrong answer of the base model to each sum to which it gave both, drawn among them."""
    task, drawn = task_of("sums"), random.Random(seed)
    questions = list(task.questions())
    drawn.shuffle(questions)
    rows = []
    for question, texts in zip(questions, sampled(base, task, questions, ASKED, seed), strict=True):
        of_gold = dict(zip(texts, gold_of(task, question, texts), strict=True))
        right, wrong = ([text for text, value in of_gold.items() if value == wanted and text.strip()] for wanted in (1, 0))
        if right and wrong:
            rows.append({"prompt": str(question.context), "chosen": drawn.choice(right), "rejected": drawn.choice(wrong)})
    return rows


def proxy(base: Path, rows: Sequence[dict[str, str]], folder: Path, seed: int) -> dict[str, Any]:
    """A reward model from some pairs, in `folder`."""
    done = folder / "summary.json"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = RewardConfig.parse({"data": ["pairs.jsonl"], **REWARD}, "reward")
        write_json(done, reward(config, base, folder, seed=seed, folder=folder, progress=progress_for_terminal()))
    return dict(read_json(done, "summary of a reward model"))


# --- what is optimised ----------------------------------------------------------------------------------------------


def best_of_n(judge: RewardModel, texts: Sequence[Sequence[str]]) -> list[dict[str, float]]:
    """Both rewards of the answer that the proxy finds the best of n, for n in powers of two, over all such choices among
    `texts`, BEST_OF samples of each of the first QUESTIONS held-out sums; and how far these answers are from the base model,
    log n − (n − 1)/n nats at most."""
    task = task_of("sums_held_out")
    questions = list(task.questions())[:QUESTIONS]
    numbers = [2**power for power in range(int(math.log2(BEST_OF)) + 1)]
    # of all subsets of a size, the share of which the sample of a rank is the best
    shares = {
        number: [math.comb(rank, number - 1) / math.comb(BEST_OF, number) for rank in range(BEST_OF)] for number in numbers
    }
    sums = {number: [0.0, 0.0] for number in numbers}
    for question, answers in zip(questions, texts, strict=True):
        scores = judge.score([str(question.context)] * BEST_OF, answers)
        ordered = sorted(zip(scores, gold_of(task, question, answers), strict=True))
        for number, of_kind in product(numbers, (0, 1)):
            sums[number][of_kind] += sum(share * one[of_kind] for share, one in zip(shares[number], ordered, strict=True))
    return [
        {"n": number, "kl": math.log(number) - (number - 1) / number}
        | {name: total / len(questions) for name, total in zip(("proxy", "gold"), sums[number], strict=True)}
        for number in numbers
    ]


def trained(base: Path, judge: Path, folder: Path, seed: int) -> list[dict[str, float]]:
    """Both rewards of a policy's samples while GRPO optimises the proxy's, and its divergence from the base model in nats a
    completion."""
    folder.mkdir(parents=True, exist_ok=True)
    rewards = [{"reward": "reward_model", "model": str(judge)}, {"reward": "task", "weight": 0.0}]
    config = RLConfig.parse({**RL, "rewards": rewards}, "rl")
    rl(config, base, folder, seed=seed, folder=folder, progress=progress_for_terminal())
    return [
        {
            "step": line["step"],
            "kl": line["kl"] * line["completion_tokens"],
            "proxy": line["reward_reward_model"],
            "gold": line["reward_task"],
        }
        for line in read_metrics(folder / "metrics.jsonl")
        if line.get("reward_task") is not None
    ]


def smoothed(lines: Sequence[dict[str, float]], over: int = 10) -> list[dict[str, float]]:
    """Means of `over` lines each."""
    return [{key: sum(line[key] for line in some) / len(some) for key in some[0]} for some in parts(lines, over)]


# --- what is said of it -----------------------------------------------------------------------------------------------


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Gold, and the proxy in its own unit, over the square root of the divergence: best of n on the left, GRPO on the right."""
    import matplotlib
    from matplotlib.figure import Figure

    colours = ("#cc5533", "#cc9933", "#3366cc")
    with matplotlib.rc_context({"svg.hashsalt": "bessemer", "font.size": 8.0}):
        figure = Figure(figsize=(12, 3), layout="constrained", facecolor="white")
        kinds = product(("best_of_n", "grpo"), (("gold", "right answers (gold)"), ("proxy", "reward model (proxy)")))
        for axes, (way, (key, label)) in zip(figure.subplots(1, 4), kinds, strict=True):
            for one, colour in zip(found, colours, strict=True):
                axes.plot(
                    [math.sqrt(max(line["kl"], 0)) for line in one[way]],
                    [line[key] for line in one[way]],
                    color=colour,
                    linewidth=1.0,
                    label=f"{one['pairs']:,} pairs",
                )
            axes.set(title={"best_of_n": "best of n: ", "grpo": "GRPO: "}[way] + label, xlabel="√KL, nats of a completion")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.legend(frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, default=Path(tempfile.gettempdir()) / "bessemer-sums", help="folder whose runs are used"
    )
    options = parser.parse_args()
    sys.argv[0] = str(Path(sys.argv[0]).resolve())  # the record names the command by where this file lies
    shutil.copytree(EXAMPLE, options.out, dirs_exist_ok=True)
    os.chdir(options.out)
    overrides, before = base_of(options.seed)
    base = ran("recipe.yaml", overrides, f"base-{options.seed}-{before['steps']}", until="pretrain")["pretrain"] / "model"
    place = options.out / f"overoptimisation-{options.seed}"
    place.mkdir(exist_ok=True)
    if not (place / "pairs.json").exists():
        write_json(place / "pairs.json", pairs_of(base, options.seed))
    rows = read_json(place / "pairs.json", "pairs")
    if not (place / "samples.json").exists():
        task = task_of("sums_held_out")
        write_json(place / "samples.json", sampled(base, task, list(task.questions())[:QUESTIONS], BEST_OF, options.seed))
    texts = read_json(place / "samples.json", "samples")
    found = []
    for number in PAIRS:
        folder = place / f"proxy-{number}"
        summary = proxy(base, rows[:number], folder, options.seed)
        chosen = best_of_n(RewardModel.open(folder / "model"), texts)
        lines = smoothed(trained(base, folder / "model", place / f"rl-{number}", options.seed))
        found.append({"pairs": number, "accuracy": summary["held_out_accuracy"], "best_of_n": chosen, "grpo": lines})
        print(number, {key: value for key, value in found[-1].items() if key != "grpo"}, lines[-1], flush=True)
    columns = [
        ("pairs the proxy learnt from", ",d"),
        ("pairs held out in the right order", ".0%"),
        ("right answers, base", ".1%"),
        ("best of n, at its best", ".1%"),
        ("n", ",d"),
        (f"best of {BEST_OF}", ".1%"),
        ("GRPO, at the end", ".1%"),
        ("proxy's score, base", ".1f"),
        (f"score, best of {BEST_OF}", ".1f"),
        ("score, GRPO at the end", ".1f"),
    ]
    table = []
    for one in found:
        chosen, last = one["best_of_n"], one["grpo"][-1]
        best = max(chosen, key=lambda line: line["gold"])
        right = [chosen[0]["gold"], best["gold"], best["n"], chosen[-1]["gold"], last["gold"]]
        table.append([one["pairs"], one["accuracy"], *right, chosen[0]["proxy"], chosen[-1]["proxy"], last["proxy"]])
    draw(found, Path(__file__).resolve().parents[1] / "docs" / "images" / "overoptimisation.svg")
    figures = {"seed": options.seed, "base": before, "proxies": found}
    print(recording.save("overoptimisation", figures, tables={"gold": recording.table(columns, table)}))


if __name__ == "__main__":
    main()
