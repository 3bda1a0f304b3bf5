"""Rollouts by a server: the score of a synchronous run and of an asynchronous one that is killed; updates beside slow tools.

    python benchmarks/rollout_servers.py [--seeds 3] [--steps 400] [--out FOLDER]    # most of an hour on two cores
    python benchmarks/rollout_servers.py --untimed --steps 80 --batch-size 256 --base-steps 92   # the score alone, shorter
    python benchmarks/rollout_servers.py --untimed --steps 200 --often-right         # from models that add a quarter rightly
    python benchmarks/rollout_servers.py --quick                                      # a minute, to see that it works

**Score.** The base models and settings of `sums.py`: a model that adds rarely right learns to add from rewards (with
`--base-steps` all base models read sums for as many steps, and none is looked for that adds as rarely as there; with
`--often-right` each reads them until it adds at least a quarter rightly, so that no moment of taking off is compared). One run
samples with its own engine and waits for each rollout. The other has a server in a second process and trains while that
samples, at most one version ahead; it is killed (SIGKILL) in the middle, twice, and started again. Both are asked the held-out
sums, as the base model was. For each seed the paired difference of the two runs has an interval over the sums. Two trainings
from one start end apart by themselves, so what decides is the interval of the mean difference over the seeds (Student's t):
the scores agree where it has zero inside, and the comparison could have failed only where half of that interval is less than
half of what the synchronous runs have learnt; with less it ends with an error. What a seed has found in the folder is not done
again at the same commit. Runs go on until rewards have nearly risen as far as they will: a model that is rarely right takes off
after 50 updates or after 150, and 200 updates compare that moment and no skill.

**Slow tools.** Episodes of two turns in an environment that waits a second a turn: updates a minute with one environment after
the other, with waiting environments side by side on the own engine, and on a server, one version ahead.

Result: `rollout_servers.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import recording
import sums
from bessemer.core.environment import set_environment

set_environment()  # before PyTorch reads it

from bessemer.core.metrics import read_metrics  # noqa: E402
from bessemer.core.progress import progress_for_terminal  # noqa: E402
from bessemer.core.statistics import mean_estimate, paired_difference  # noqa: E402
from bessemer.evaluation.task_answerers import answers  # noqa: E402
from bessemer.inference.engine import Engine  # noqa: E402
from bessemer.posttraining.rl.config import RLConfig  # noqa: E402
from bessemer.posttraining.rl.stage import rl  # noqa: E402
from bessemer.tasks.config import TaskOptions  # noqa: E402
from bessemer.tasks.registry import find_tasks  # noqa: E402
from rounds import summary  # noqa: E402

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/posttraining", "src/bessemer/assistant", "src/bessemer/inference", "src/bessemer/serving")

#: The settings of `examples/arithmetic/recipe.yaml`, without the tasks along the way.
SETTINGS: dict[str, Any] = {
    "data": ["sums"],
    "validation_share": 0,
    "algorithm": "grpo",
    "group_size": 4,
    "batch_size": 512,
    "max_tokens": 8,
    "context_length": 32,
    "optimizer": "muon",
    "learning_rate": 1e-3,
    "decay_fraction": 0.4,
    "warmup_steps": 10,
    "beta": 1e-3,
    "diagnostics_every": 0,
    "checkpoint_every": 10,
}
#: Episodes of two turns; a row's number is added to.
SLOW = """
import time
from bessemer.assistant.episodes import StepResult
from bessemer.assistant.messages import Message


class Slow:
    tools = ()
    waits = True

    def reset(self, task, seed):
        self.turns = 0
        return [Message.user(task["prompt"])]

    def step(self, conversation, end):
        time.sleep({seconds})
        self.turns += 1
        text = conversation.messages[-1].text
        return StepResult(float(text[:1].isdigit()), [Message.user("1+1=")] if self.turns < 2 else ())
"""
SLOW_SETTINGS: dict[str, Any] = {
    "data": ["prompts.jsonl"],
    "environment": "slow.py:Slow",
    "rewards": ["environment"],
    "max_turns": 2,
    "validation_share": 0,
    "group_size": 4,
    "batch_size": 16,
    "max_tokens": 4,
    "context_length": 64,
    "diagnostics_every": 0,
    "learning_rate": 1e-4,
}
WAYS = {
    "one after the other": {"environment_threads": 0},
    "side by side": {"environment_threads": 32},
    "on a server, one version ahead": {"rollouts": {"max_staleness": 1}},
}
QUESTIONS = 500
#: With `--often-right`: steps of pretraining that are tried, and the share of sums that a base model adds rightly at least.
LENGTHS, OFTEN = (128, 144, 160, 192, 224), 0.25


@contextmanager
def served(model: Path) -> Iterator[str]:
    """The URL of a server of this model in a process of its own."""
    command = [sys.executable, "-m", "bessemer", "serve", str(model), "--accept-weights", "--port", "0", "--max-waiting", "256"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if "http://" in line:
                    yield "http://" + line.split("http://", 1)[1].split()[0].rstrip("/")
                    break
            else:
                raise SystemExit("the server did not start")
        finally:
            process.terminate()


def train(settings: dict[str, Any], model: Path, out: Path, seed: int, folder: Path) -> None:
    """One training, in this process."""
    out.mkdir(parents=True, exist_ok=True)
    rl(RLConfig.parse(settings, "rl"), model, out, seed=seed, device="cpu", folder=folder, progress=progress_for_terminal())


def train_and_kill(settings: dict[str, Any], model: Path, out: Path, seed: int, folder: Path, kills: Sequence[int]) -> int:
    """One training in a process of its own, which is killed after each of these steps and started again. Returns how many
    completed groups the next starts have found."""
    job = {"settings": settings, "model": str(model), "out": str(out), "seed": seed, "folder": str(folder)}
    found = 0
    for step in (*kills, None):
        with subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--job", json.dumps(job)],
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        ) as process:
            while step is not None and process.poll() is None and steps_of(out) < step:
                time.sleep(0.05)
            if step is None:
                process.wait()
            else:
                process.send_signal(signal.SIGKILL)
        if step is not None:
            found += sum(
                len(path.read_text(encoding="utf-8").splitlines()) for path in (out / "rollouts").glob("groups-*.jsonl")
            )
    return found


def steps_of(out: Path) -> int:
    path = out / "metrics.jsonl"
    lines = list(read_metrics(path)) if path.exists() else []
    return int(lines[-1]["step"]) if lines else 0


def often_right(seed: int) -> list[str]:
    """The shortest pretraining of a seed, of those tried, whose model adds at least `OFTEN` rightly, as overrides."""
    for steps in LENGTHS:
        overrides = [f"seed={seed}", f"pretrain.steps={steps}"]
        done = sums.ran("recipe.yaml", overrides, f"often-{seed}-{steps}", until="pretrain")
        found = sums.asked(done["pretrain"] / "model", chat=False)["right"]
        print(f"seed {seed}: {steps} steps, {found:.1%} right", flush=True)
        if found >= OFTEN:
            return overrides
    raise SystemExit(f"seed {seed}: no base model adds {OFTEN:.0%} rightly")


def right(model: Path, questions: int) -> list[float]:
    """Of each held-out sum, whether the model adds it rightly, greedily."""
    (task,) = find_tasks([sums.TASK], TaskOptions())
    asked = task.questions()[:questions]
    headline = task.headline(asked[0].form)
    return [one.scores[headline] for batch in answers(Engine(model, device="cpu"), task, asked) for one in batch]


def score_of(seed: int, model: Path, folder: Path, steps: int, questions: int) -> dict[str, Any]:
    """The synchronous and the asynchronous run of a seed; what lies in the folder from this commit is taken."""
    kept = folder / f"score-{seed}-{steps}-{SETTINGS['batch_size']}-{model.resolve().parent.name}.json"
    if kept.exists() and (found_before := json.loads(kept.read_text(encoding="utf-8")))["commit"] == recording.when()["commit"]:
        return dict(found_before["score"])
    settings = {**SETTINGS, "steps": steps}
    plain, ahead = folder / f"synchronous-{seed}", folder / f"asynchronous-{seed}"
    for old in (plain, ahead):
        shutil.rmtree(old, ignore_errors=True)
    train(settings, model, plain, seed, folder)
    with served(model) as url:
        rollouts = {"servers": [url], "max_staleness": 1}
        kills = (steps // 3, 2 * steps // 3)
        found = train_and_kill({**settings, "rollouts": rollouts}, model, ahead, seed, folder, kills)
    lines = list(read_metrics(ahead / "metrics.jsonl"))
    models = {"before": model, "synchronous": plain / "model", "asynchronous": ahead / "model"}
    scores = {name: right(folder_of, questions) for name, folder_of in models.items()}
    difference = paired_difference(scores["asynchronous"], scores["synchronous"])
    score = {
        "seed": seed,
        **{name: sum(values) / len(values) for name, values in scores.items()},
        "mean_difference": difference.mean,
        "difference": list(difference.interval()),
        "gain": list(paired_difference(scores["synchronous"], scores["before"]).interval()),
        "staleness": max(line["staleness_max"] for line in lines),
        "groups_found_after_kills": found,
        "prompts_repeated": repeated(ahead / "completions.jsonl"),
    }
    kept.write_text(json.dumps(recording.when() | {"score": score}), encoding="utf-8")
    return score


def verdict(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over all seeds: the mean difference with its interval, what was learnt, whether the scores agree, and whether a
    difference of half of what was learnt would have been seen."""
    difference = mean_estimate([one["mean_difference"] for one in seeds])
    gain = sum(one["synchronous"] - one["before"] for one in seeds) / len(seeds)
    low, high = difference.interval()
    return {
        "difference": difference.mean,
        "interval": [low, high],
        "gain": gain,
        "agree": low <= 0 <= high,
        "could_fail": (high - low) / 2 < gain / 2,
    }


def repeated(path: Path) -> int:
    """Groups whose step and place the log has twice."""
    groups = [(one["step"], one["group"]) for one in read_metrics(path)]
    per_group = SETTINGS["group_size"]
    return len(groups) - per_group * len(set(groups))


def updates_a_minute(model: Path, folder: Path, seconds: float, steps: int) -> dict[str, Any]:
    """Of each way to wait, the updates a minute."""
    (folder / "slow.py").write_text(SLOW.replace("{seconds}", str(seconds)), encoding="utf-8")
    rows = [{"prompt": f"{first}+{second}="} for first in range(1, 10) for second in range(1, 10)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    figures = {}
    with served(model) as url:
        for name, way in WAYS.items():
            settings = {**SLOW_SETTINGS, **way, "steps": steps}
            if "rollouts" in settings:
                settings["rollouts"] = {**settings["rollouts"], "servers": [url]}
            out = folder / f"slow-{name.replace(' ', '-').replace(',', '')}"
            train(settings, model, out, 1, folder)
            lines = list(read_metrics(out / "metrics.jsonl"))
            ends = [line["seconds"] for line in lines]
            # the first update opens the engine
            figures[name] = summary(60 / (later - earlier) for earlier, later in pairwise(ends))
            print(f"{name}: {figures[name]['median']:.1f} updates a minute", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400, help="updates of each run of the score")
    parser.add_argument("--quick", action="store_true", help="a model that has learnt nothing, and few updates")
    parser.add_argument("--batch-size", type=int, default=SETTINGS["batch_size"], help="completions of an update")
    parser.add_argument("--base-steps", type=int, help="steps of pretraining of every base model")
    parser.add_argument("--often-right", action="store_true", help="base models that add at least a quarter rightly")
    parser.add_argument("--untimed", action="store_true", help="the score alone: other work may run")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "bessemer-rollout-servers")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job is not None:
        job = json.loads(options.job)
        train(job["settings"], Path(job["model"]), Path(job["out"]), job["seed"], Path(job["folder"]))
        return
    sys.argv[0] = str(Path(sys.argv[0]).resolve())  # the record names the command by where this file lies
    shutil.copytree(sums.EXAMPLE, options.out, dirs_exist_ok=True)
    os.chdir(options.out)
    for old in options.out.glob("slow-*"):
        shutil.rmtree(old)
    if options.quick:
        options.batch_size = 32
        SETTINGS.update(warmup_steps=2)
    SETTINGS.update(batch_size=options.batch_size)
    seeds, models = [], []
    for seed in range(1, (1 if options.quick else options.seeds) + 1):
        if options.quick:
            done = sums.ran("recipe.yaml", [f"seed={seed}", "pretrain.steps=8"], "quick", until="pretrain")
            model = done["pretrain"] / "model"
        else:
            if options.often_right:
                overrides = often_right(seed)
            elif options.base_steps is None:
                overrides, _ = sums.base_of(seed)
            else:
                overrides = [f"seed={seed}", f"pretrain.steps={options.base_steps}"]
            model = sums.ran("recipe.yaml", overrides, f"again-{seed}", until="pretrain")["pretrain"] / "model"
        models.append(model)
        questions = 50 if options.quick else QUESTIONS
        seeds.append(score_of(seed, model, options.out, 9 if options.quick else options.steps, questions))
        print(seeds[-1], flush=True)
    figures: dict[str, Any] = {
        "seeds": seeds,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "often_right": options.often_right,
    }
    if not options.untimed:
        seconds, steps = (0.2, 4) if options.quick else (1.0, 12)
        figures["updates_a_minute"] = updates_a_minute(models[0], options.out, seconds, steps)
    if options.quick:
        print(json.dumps(figures))
        return
    scores = recording.table(
        [
            ("seed", "d"),
            ("before", ".1%"),
            ("synchronous", ".1%"),
            ("asynchronous, killed twice", ".1%"),
            ("difference, 95 % over the sums", ".1%"),
        ],
        [[one["seed"], one["before"], one["synchronous"], one["asynchronous"], one["difference"]] for one in seeds],
    )
    tables = {"scores": scores}
    if "updates_a_minute" in figures:
        tables["waits"] = recording.table(
            [("environments that wait a second a turn", ""), ("updates a minute", ".1f")],
            [[name, found["median"]] for name, found in figures["updates_a_minute"].items()],
        )
    figures["over_seeds"] = over_seeds = verdict(seeds)
    note = "Nothing was timed: other work ran beside it." if options.untimed else None
    print(over_seeds)
    print(recording.save("rollout_servers", figures, tables=tables, note=note))
    if not (over_seeds["agree"] and over_seeds["could_fail"]):
        raise SystemExit("the scores differ" if over_seeds["could_fail"] else "the runs learnt too little to compare")


if __name__ == "__main__":
    main()
