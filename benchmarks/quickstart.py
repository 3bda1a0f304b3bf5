"""The quickstart from an empty folder and again: how long it takes, where the time goes, and what its model scores.

    python benchmarks/quickstart.py             # once, about ten minutes on two cores
    python benchmarks/quickstart.py --runs 3    # from an empty folder each time: medians and spreads
    python benchmarks/quickstart.py --of A B C  # of runs that `make run` made in these folders, each with empty caches
    python benchmarks/quickstart.py --smoke     # the same code on a small offline run: no measurement

A run downloads its packages and compiles anew. All figures are read from the files that it leaves: manifests, `results.json`
(bits per byte beside an interpolated Witten–Bell byte 5-gram trained on the same bytes), `quality.json`, `metrics.jsonl`.
Result: `quickstart.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

import recording
from bessemer.core.metrics import duration, read_metrics
from bessemer.pipeline.stages import STAGES
from rounds import summary

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = (
    "src/bessemer/recipes/quickstart.yaml",
    "src/bessemer/recipes/chat.yaml",
    "src/bessemer/pipeline",
    "src/bessemer/data",
    "src/bessemer/tokenization",
    "src/bessemer/model",
    "src/bessemer/training",
    "src/bessemer/posttraining",
    "src/bessemer/evaluation",
)

DATA_STAGES = ("collect", "clean", "select", "deduplicate")
#: Why a data stage drops documents, by how its reason begins; the first that fits counts.
REASONS = {
    "duplicate": "copies",
    "near duplicate": "near copies",
    "gopher repetition": "repeats itself",
    "language": "of uncertain language",
    "gopher: words with letter": "mostly signs",
    "gopher: words": "too few or too many words",
}
BASELINES = {
    "witten_bell_5gram": "Witten–Bell byte 5-gram",
    "witten_bell_6gram": "Witten–Bell byte 6-gram",
    "xz": "`xz -9` on that text alone",
}
#: What the reward model is good for, on pairs held out.
REWARD_MODEL = ("held_out", "held_out_accuracy", "held_out_accuracy_low", "held_out_accuracy_high")
AROUND = "around them: measuring this machine, starting, the report"
#: What a reader must know of figures that `--of` gives.
OF_RUNS = "Of runs of `make run`: their seconds begin with the first stage; starting Python and drawing the report are outside."
MODELS = {
    "pretrain": "pretrained",
    "sft": "tuned on questions and sums",
    "preference": "then on pairs of answers (DPO)",
    "rl": "then by rewards of its own sums (GRPO)",
}
#: Stages whose training is timed.
TRAINED = ("pretrain", "sft", "reward", "preference", "rl")
WEIGHTS = {"original": "float32", "quantised": "int8"}
SMOKE = (
    "collect=[python_docs]",
    "pretrain.minutes=null",
    "pretrain.steps=3",
    "sft.epochs=1",
    "sft.task_items=200",
    "reward.steps=2",
    "preference.steps=2",
    "rl.steps=12",  # more than its warm-up and decay
    "rl.batch_size=32",
    "evaluate.questions=2",
    "evaluate.max_tokens=2000",
    "quantize.quality_tokens=2000",
)


# --- one run ------------------------------------------------------------------------------------------------------


def timed(*arguments: str, folder: Path, caches: Path) -> float:
    """Seconds of one `bessemer` command, its output passed through. What PyTorch compiles is kept below `caches`."""
    places = {"TMPDIR": str(caches), "TORCH_EXTENSIONS_DIR": str(caches / "extensions")}
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "bessemer", *arguments], cwd=folder, check=True, env=os.environ | places)
    return time.perf_counter() - start


def fastest(*arguments: str, folder: Path, repeats: int = 5) -> float:
    """Seconds of the fastest of several runs of a quick command, its output dropped."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "bessemer", *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def one_run(overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The figures of a run in an empty folder."""
    command = ("run", "quickstart", *overrides, "--name", "quickstart")
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as caches:
        folder = Path(name)
        seconds = {round: timed(*command, folder=folder, caches=Path(caches)) for round in ("first_run", "again")}
        return figures_of_run(folder, seconds)


def made_run(folder: Path) -> dict[str, Any]:
    """The figures of the run that `make run` made in `folder`: its first seconds are those that it counted itself.

    They begin with its first stage and end with its last. Running it again, as here, overwrites them.
    """
    record = json.loads((folder / "runs" / "quickstart" / "run.json").read_text(encoding="utf-8"))
    if any(stage["reused"] for stage in record["stages"].values()):
        raise SystemExit(f"{folder}: it was run again, which overwrote the seconds of the first time")
    first = record["seconds"]
    with tempfile.TemporaryDirectory() as caches:
        again = timed("run", "quickstart", folder=folder, caches=Path(caches))
    return figures_of_run(folder, {"first_run": first, "again": again})


def figures_of_run(folder: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """The figures of a finished run. seconds: of the command from nothing, and of the same with nothing left to do."""
    stages = folder / "runs" / "quickstart" / "stages"
    made = json.loads((stages.parent / "run.json").read_text(encoding="utf-8"))["stages"]
    manifests = {stage: json.loads((stages / stage / "manifest.json").read_text(encoding="utf-8")) for stage in made}
    metrics = {stage: manifest["metrics"] for stage, manifest in manifests.items()}
    results = json.loads((stages / "evaluate" / "results.json").read_text(encoding="utf-8"))
    quality = json.loads((stages / "quantize" / "model" / "quality.json").read_text(encoding="utf-8"))
    lock = YAML(typ="safe").load(stages.parent / "recipe.lock.yaml")["stages"]
    resolved = {stage: lock.get(stage, {}).get("measured") for stage in TRAINED}
    data = [stage for stage in DATA_STAGES if stage in metrics]
    stages_seconds = {stage: manifest["seconds"] for stage, manifest in manifests.items()}
    evaluation = lock.get("evaluate", {}).get("measured") or {}
    around = seconds["first_run"] - sum(stages_seconds.values())
    return {
        "seconds": seconds | {"help": fastest("--help", folder=folder), "around_the_stages": around},
        "stages": stages_seconds,
        "training": {stage: training_of(stages / stage, manifests[stage], resolved[stage]) for stage in TRAINED},
        "evaluation": evaluation,
        "parameters": metrics["model"]["parameters"],
        "documents": {
            stage: {"documents": metrics[stage]["documents_out"], "bytes": metrics[stage]["bytes_out"]} for stage in data
        },
        "dropped": {stage: by_reason(metrics[stage]["by_reason"]) for stage in data if metrics[stage]["by_reason"]},
        "masked": masked(metrics["clean"]["counted"]),
        "scored": results["scored"] | {"megabytes": results["scored"]["bytes"] / 1e6},
        "bits_per_byte": results["bits_per_byte"],
        "baselines": results["baselines"],
        "questions": results["tasks"]["docs_questions"],
        "sums": {model: found["accuracy"] for model, found in results["tasks"]["sums_held_out"].items()},
        "reward_model": {key: metrics["reward"][key] for key in REWARD_MODEL},
        "int8": {name: quality[name] for name in WEIGHTS} | {"kl_per_token": quality["kl_per_token"]},
    }


def training_of(stage: Path, manifest: dict[str, Any], resolved: dict[str, Any] | None) -> dict[str, Any]:
    """What a stage that trains spent its seconds on.

    resolved: what the machine was measured at before the stage began, when its settings said `minutes`. measuring: the seconds
    that this took, compiling included; not part of the stage's. before_the_first_step: loading, and in a stage that says `auto`
    the measurement. steps: in training steps. rest: validation, samples, checkpoints. compiling: the first step of the
    compiled candidate, where one was measured. measured: what the choices were made by.
    """
    autotune, metrics, total = stage / "autotune.json", manifest["metrics"], manifest["seconds"]
    began = (stage / "manifest.json").stat().st_mtime - total
    before = max(0.0, autotune.stat().st_mtime - began)
    steps = read_metrics(stage / "metrics.jsonl")[-1]["seconds"]
    measured = resolved or json.loads(autotune.read_text(encoding="utf-8")).get("measured") or {}
    compiled = [candidate["first"] for candidate in measured.get("candidates") or () if candidate.get("compile")]
    return {
        "measuring": (resolved or {}).get("seconds"),
        "before_the_first_step": before,
        "steps": steps,
        "rest": max(0.0, total - before - steps),
        "compiling": compiled[0] if compiled else None,
        "number_of_steps": metrics["steps"],
        "tokens": metrics.get("tokens"),
        "tokens_per_second": metrics.get("tokens_per_second"),
        "dtype": metrics.get("dtype"),
        "compile": metrics.get("compile"),
        "measured": measured,
    }


def by_reason(reasons: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Documents and bytes that a stage dropped, by reasons that say the same, most documents first."""
    found: dict[str, dict[str, int]] = {}
    for reason, counts in reasons.items():
        why = next((why for start, why in REASONS.items() if reason.startswith(start)), "other")
        sums = found.setdefault(why, {"documents": 0, "bytes": 0})
        for key in sums:
            sums[key] += counts[key]
    return dict(sorted(found.items(), key=lambda entry: (entry[0] == "other", -entry[1]["documents"])))


def masked(counted: dict[str, dict[str, int]]) -> dict[str, int]:
    """What the edits masked, by kind: `emails`, `passwords`."""
    return {
        name.removeprefix(edit): found["total"]
        for name, found in counted.items()
        for edit in ("personal_data_", "secrets_")
        if name.startswith(edit)
    }


# --- several ------------------------------------------------------------------------------------------------------


def gathered(values: list[Any]) -> Any:
    """The figures of several runs in the shape of one: summaries of numbers that may differ, the rest as the first run says."""
    first = values[0]
    if isinstance(first, dict):
        return {key: gathered([value.get(key) for value in values]) for key in first}
    is_number = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return summary(values) if is_number else first


#: What may differ from run to run; all else follows from the recipe.
_VARYING = ("seconds", "stages", "training", "bits_per_byte", "questions", "sums", "reward_model", "int8")


def figures_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The result of one or more runs."""
    varying = {key: gathered([run[key] for run in runs]) for key in _VARYING}
    return {"runs": len(runs), **{key: varying.get(key, value) for key, value in runs[0].items()}}


# --- tables -------------------------------------------------------------------------------------------------------


def tables(figures: dict[str, Any]) -> dict[str, Any]:
    """What README and docs show."""
    documents, questions, weights = figures["documents"], figures["questions"], figures["int8"]
    training = {stage: found for stage, found in figures["training"].items() if median(found["steps"]) is not None}
    parts = {
        "measuring this machine, compiling": "measuring",
        "loading": "before_the_first_step",
        "training steps": "steps",
        "validation, samples, checkpoints": "rest",
    }
    return {
        "summary": recording.table([("", ""), ("", "")], summary_rows(figures)),
        "stages": recording.table(
            [("stage", ""), ("seconds", ",.1f"), ("its share of ten minutes", ",.0f")],
            [
                *((stage, median(taken), STAGES[stage].budget_seconds) for stage, taken in figures["stages"].items()),
                (
                    AROUND,
                    median(figures["seconds"]["around_the_stages"]),
                    None,
                ),
            ],
        ),
        "training": recording.table(
            [("seconds of", ""), *((stage, ",.1f") for stage in training)],
            [(label, *(median(found[key]) for found in training.values())) for label, key in parts.items()],
        ),
        "documents": recording.table(
            [("after", ""), ("documents", ",.0f"), ("MB of text", ".1f")],
            [(stage, found["documents"], found["bytes"] / 1e6) for stage, found in documents.items()],
        ),
        "dropped": recording.table(
            [("dropped by", ""), ("because", ""), ("documents", ",.0f"), ("MB of text", ".1f")],
            [
                (stage, why, found["documents"], None if found["bytes"] is None else found["bytes"] / 1e6)
                for stage, reasons in figures["dropped"].items()
                for why, found in reasons.items()
            ],
        ),
        "bits_per_byte": recording.table(
            [("bits per byte of packages never trained on", ""), ("", ".2f")],
            [
                *((label, median(figures["bits_per_byte"].get(model))) for model, label in MODELS.items()),
                *((label, figures["baselines"].get(name)) for name, label in BASELINES.items()),
            ],
        ),
        "models": recording.table(
            [
                ("the model", ""),
                ("bits per byte", ".3f"),
                ("questions about other packages, ROUGE-L", ".2f"),
                ("the same it was tuned on, exactly (memorised)", ".0%"),
                ("sums never seen, right", ".1%"),
            ],
            [
                (
                    label,
                    median(figures["bits_per_byte"].get(model)),
                    *(median(questions[model].get(key)) for key in ("rouge_l_held_out", "exact_match_held_in")),
                    median(figures["sums"].get(model)),
                )
                for model, label in MODELS.items()
                if model in questions
            ],
        ),
        "int8": recording.table(
            [("weights", ""), ("MB", ".1f"), ("bits per byte", ".4f"), ("tokens/s of 8 answers at once", ",.0f")],
            [
                (
                    label,
                    median(weights[name]["bytes"]) / 1e6,
                    median(weights[name]["bits_per_byte"]),
                    median(weights[name].get("tokens_per_second")),
                )
                for name, label in WEIGHTS.items()
            ],
        ),
    }


def summary_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """The headline figures in words, for the README."""
    seconds, documents, baselines = figures["seconds"], figures["documents"], figures["baselines"]
    first, last = documents["collect"], documents[DATA_STAGES[-1]]
    base, *_, last_model = (figures["questions"][model] for model in MODELS)
    sums, judge = figures["sums"], figures["reward_model"]
    before, after = (figures["int8"][name] for name in WEIGHTS)
    right = [f"{median(sums[model]):.0%}".replace("%", " %") for model in MODELS]
    ranked = [f"{median(judge[key]):.0%}".replace("%", " %") for key in REWARD_MODEL[1:]]
    kept = [f"{found['documents']:,} ({found['bytes'] / 1e6:.1f} MB)" for found in (first, last)]
    sizes = [f"{median(found['bytes']) / 1e6:.1f}" for found in (before, after)]
    scores = [f"{median(found['bits_per_byte']):.4f}" for found in (before, after)]
    speeds = [f"{median(found['tokens_per_second']):,.0f}" for found in (before, after)]
    return [
        ("the first run, from an empty folder", shown(seconds["first_run"], duration)),
        ("again, nothing changed", shown(seconds["again"], duration)),
        ("documents collected → kept", " → ".join(kept)),
        ("bits per byte on packages never trained on", shown(figures["bits_per_byte"]["pretrain"], "{:.2f}".format)),
        (
            "beside it: Witten–Bell byte 5-gram, 6-gram, `xz -9`",
            ", ".join(f"{baselines[name]:.2f}" for name in BASELINES),
        ),
        ("sums never seen, right: base, tuned, after DPO, after GRPO", ", ".join(right)),
        (
            "questions about other packages, ROUGE-L: base, at the end",
            f"{median(base['rouge_l_held_out']):.2f}, {median(last_model['rouge_l_held_out']):.2f}",
        ),
        (
            "pairs of a right and a wrong answer that the reward model ranks (95 %)",
            f"{ranked[0]} ({ranked[1]} to {ranked[2]} of {median(judge['held_out']):,.0f})",
        ),
        (
            "the chat model in int8 instead of float32: size, bits per byte, tokens/s of 8 answers at once",
            f"{' → '.join(sizes)} MB, {' → '.join(scores)}, {' → '.join(speeds)}",
        ),
    ]


def median(figure: Any) -> float | None:
    return figure["median"] if isinstance(figure, dict) else figure


def shown(figure: dict[str, Any], form: Any) -> str:
    """A median, and where it is of several runs the ends of their range."""
    rounds = [form(value) for value in (min(figure["rounds"]), max(figure["rounds"]))]
    return form(figure["median"]) + ("" if rounds[0] == rounds[1] else f" ({' to '.join(rounds)})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1, help="from an empty folder each")
    parser.add_argument("--of", type=Path, nargs="+", metavar="FOLDER", help="where `make run` made a run each")
    parser.add_argument("--smoke", action="store_true", help="exercise the code on a small offline run, write no result")
    arguments = parser.parse_args()
    if arguments.of:
        runs = [made_run(folder) for folder in arguments.of]
    else:
        runs = [one_run(SMOKE if arguments.smoke else ()) for _ in range(arguments.runs)]
    figures = figures_of(runs)
    made = tables(figures)
    print()
    for table in made.values():
        for row in table["rows"]:
            print("  ".join("" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
        print()
    note = OF_RUNS if arguments.of else None
    print("a smoke test: no result" if arguments.smoke else recording.save("quickstart", figures, tables=made, note=note))


if __name__ == "__main__":
    main()
