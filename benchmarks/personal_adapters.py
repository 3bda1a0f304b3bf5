"""What is an adapter of one's own worth, and what is a stranger's? Six people of opposite tastes, SmolLM2-135M-Instruct.

    python benchmarks/personal_adapters.py [--data FOLDER] [--work FOLDER] [--out FOLDER]      # an hour and more on one core

Three pairs of people, each of whom likes in an answer what the other dislikes; the tastes below were written, and the base
model's share of them looked at, before anything was trained, so that both of a pair have room: cheerful or formal openings, the
words of sailors or of courtiers, doubt or certainty. Answers are those of `instructions_polite_1100.json`, dressed in one of
a manner's phrases at random. Each person gives feedback on prompts of their own, `bessemer personalise` trains on it (two
passes) and decides, and what is measured is measured on prompts in nobody's feedback: how often the answer that the person
prefers has the higher mean log-probability of its tokens, by the base model, their own adapter, those of the four people of
other tastes, and that of their opposite. An adapter that was rolled back counts as the base model.

Then the base model answers through the engine, greedily, with the log-probabilities of its tokens: before any adapter is
loaded, with all six loaded, and in one batch with requests of all six. All three must be the same, bit for bit.

`--out` keeps what is finished: a run that was stopped goes on. Nothing is timed. Intervals are of 95 %, with a prompt as a
cluster. Result: `personal_adapters.json`.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import recording
from bessemer.core.hashing import hash_file
from bessemer.core.statistics import Estimate, mean_estimate
from bessemer.core.store import person_folder
from bessemer.posttraining.data.formats import Pair
from bessemer.posttraining.personal import ADAPTER, HISTORY, PAIRS, PersonalConfig, personalise, preferred
from evaluation_agreement import WORK
from evaluation_tasks import float32_folder
from tone import DATA

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/posttraining/personal.py", "src/bessemer/posttraining/preference", "src/bessemer/model/adapters")

#: How each person likes an answer. The people of a line are of opposite tastes: each dislikes what the other likes.
MANNERS: dict[str, Sequence[str]] = {
    "cheerful": (
        *("Great question! {}", "Happy to help! {}", "Sure thing! {}"),
        *("Oh, I love this one! {}", "Good one! {}", "Of course! {}"),
    ),
    "formal": (
        *("The answer is as follows. {}", "In reply to your request: {}", "As requested: {}"),
        *("Please find the answer below. {}", "For your information: {}", "The result is this: {}"),
    ),
    "sailor": ("Arr, {}", "Ahoy, matey! {}", "{} Says I, as sure as the tide.", "Shiver me timbers! {}"),
    "courtier": ("Hark, good sir! {}", "Verily, {}", "{} Thus it is written, my lord.", "By my troth! {}"),
    "doubtful": (
        *("I think that {}", "I may be wrong, but {}", "If I am not mistaken, {}"),
        *("{} At least, I believe so.", "{} But please check it."),
    ),
    "certain": (
        *("Without doubt, {}", "It is certain that {}", "As everybody knows, {}"),
        *("{} You can be sure of it.", "{} That is a fact."),
    ),
}
OPPOSITES = {"cheerful": "formal", "sailor": "courtier", "doubtful": "certain"}
OPPOSITES |= {second: first for first, second in OPPOSITES.items()}
#: Prompts of each person's feedback, and those that everybody is tested on.
FEEDBACK, TESTED = 80, 40
#: Characters of prompt and answer at most, so that a training is minutes of one core: rows of two answers are short, and many.
LONGEST = (60, 40)
SETTINGS = PersonalConfig(epochs=2, batch_size=2, context_length=192)
SEED = 11
#: Asked: points that one's own adapter gains at least, and a stranger's at most.
OWN_GAIN, STRANGER_GAIN = 0.10, 0.02
ANSWERS, ANSWER_TOKENS = 16, 24


def short_rows(data: Path) -> list[dict[str, str]]:
    """Instructions with their answer, those of a few words, each once, in an order of chance."""
    rows = json.loads((data / "instructions_polite_1100.json").read_text(encoding="utf-8"))
    found = {asked(row): row for row in rows if len(asked(row)) <= LONGEST[0] and len(row["output"]) <= LONGEST[1]}
    chosen = [found[key] for key in sorted(found)]
    random.Random(SEED).shuffle(chosen)
    return chosen


def asked(row: Mapping[str, str]) -> str:
    return f"{row['instruction']}\n{row['input']}".strip()


def pairs_of(name: str, rows: Sequence[Mapping[str, str]], seed: str) -> list[Pair]:
    """A person's judgements of two answers to each row."""
    chance = random.Random(seed)

    def said(manner: str, row: Mapping[str, str]) -> str:
        return chance.choice(MANNERS[manner]).format(row["output"])

    return [Pair(asked(row), said(name, row), said(OPPOSITES[name], row)) for row in rows]


def trained(model: Path, people: Path, name: str, rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """The line of a person's history, made once."""
    person = person_folder(people, name)
    if not (person / HISTORY).exists():
        person.mkdir(parents=True, exist_ok=True)
        pool = random.Random(f"prompts of {name}").sample(rows, FEEDBACK)
        lines = [
            json.dumps({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected})
            for pair in pairs_of(name, pool, f"feedback of {name}")
        ]
        (person / PAIRS).write_text("\n".join(lines) + "\n", encoding="utf-8")
        personalise(model, person, SETTINGS, device="cpu")
    line: dict[str, Any] = json.loads((person / HISTORY).read_text(encoding="utf-8").splitlines()[-1])
    print(name, line, flush=True)
    return line


def judged(model: Path, people: Path, out: Path, rows: Sequence[Mapping[str, str]]) -> dict[str, dict[str, np.ndarray]]:
    """For each person and each of the base model and all adapters: 1.0 where the person's answer is preferred, by prompt."""
    from bessemer.model.adapters.folder import read_adapter
    from bessemer.model.storage.folder import load_model
    from bessemer.tokenization.tokenizer import load_tokenizer

    decoder, tokenizer = load_model(model).eval(), load_tokenizer(model)
    found: dict[str, dict[str, np.ndarray]] = {name: {} for name in MANNERS}
    for used in ("base", *MANNERS):
        folder = people / used / ADAPTER
        adapter = read_adapter(folder, decoder) if folder.is_dir() else None
        for name in MANNERS:
            kept = out / f"{name}-by-{used}.json"
            if not kept.exists():
                pairs = pairs_of(name, rows, f"test of {name}")
                scores = preferred(decoder, tokenizer, pairs, adapter)
                kept.write_text(json.dumps(scores.tolist()), encoding="utf-8")
            found[name][used] = np.array(json.loads(kept.read_text(encoding="utf-8")))
            print(f"{name} by {used}: {found[name][used].mean():.3f}", flush=True)
    return found


def gain(scores: Mapping[str, Mapping[str, np.ndarray]], who: Sequence[str], by: Callable[[str], Sequence[str]]) -> Estimate:
    """How much more often than by the base model people's answers are preferred, over people and adapters."""
    differences, clusters = [], []
    for name in who:
        for used in by(name):
            difference = scores[name][used] - scores[name]["base"]
            differences.append(difference)
            clusters.append(np.arange(len(difference)))
    return mean_estimate(np.concatenate(differences), np.concatenate(clusters))


def everybody_else(model: Path, people: Path, rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Whether the base model's answers and their numbers are the same with adapters beside them."""
    from bessemer.inference.engine import Engine
    from bessemer.inference.sampling.params import SamplingParams

    engine = Engine(model, device="cpu")
    params = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0, logprobs=3)
    prompts = [asked(row) for row in rows[:ANSWERS]]

    def numbers(completions: Sequence[Any]) -> list[Any]:
        return [(one.token_ids, one.log_probs) for one in completions]

    before = numbers(engine.generate(prompts, params))
    names = [name for name in MANNERS if (people / name / ADAPTER).is_dir()]
    for name in names:
        engine.load_adapter(name, people / name / ADAPTER)
    loaded = numbers(engine.generate(prompts, params))
    mixed = engine.generate([*prompts, *prompts[: len(names)]], params, adapter=[None] * len(prompts) + list(names))
    return {
        "answers": len(prompts),
        "tokens": sum(len(ids) for ids, _ in before),
        "adapters": len(names),
        "same_loaded": sum(one == other for one, other in zip(before, loaded, strict=True)),
        "same_in_one_batch": sum(one == other for one, other in zip(before, numbers(mixed[: len(prompts)]), strict=True)),
        "adapters_that_answer_otherwise": sum(
            one.token_ids != other[0] for one, other in zip(mixed[len(prompts) :], before, strict=False)
        ),
    }


def as_figures(estimate: Estimate) -> dict[str, float]:
    low, high = estimate.interval(bounds=(-1.0, 1.0))
    return {"mean": estimate.mean, "low": low, "high": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="where the instructions lie")
    parser.add_argument("--work", type=Path, default=WORK, help="the model is kept here")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "bessemer-people", help="what is finished")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        recording.not_run(f"there is no folder {arguments.data} with the instructions")
    torch.set_num_threads(arguments.threads)
    model = float32_folder(arguments.work)
    weights = hash_file(model / "model.safetensors")
    rows = short_rows(arguments.data)
    tested, others = rows[:TESTED], rows[TESTED:]
    people = arguments.out / "people"
    histories = {name: trained(model, people, name, others) for name in MANNERS}
    scores = judged(model, people, arguments.out, tested)

    def strangers(name: str) -> list[str]:
        return [other for other in MANNERS if other not in (name, OPPOSITES[name])]

    kinds: dict[str, Callable[[str], Sequence[str]]] = {
        "own": lambda name: [name],
        "strangers": strangers,
        "opposite": lambda name: [OPPOSITES[name]],
    }
    each = {
        name: {
            "base": float(scores[name]["base"].mean()),
            "decision": histories[name]["decision"],
            "pairs": histories[name]["pairs"],
            "by": {used: float(found.mean()) for used, found in scores[name].items()},
            **{kind: as_figures(gain(scores, [name], by)) for kind, by in kinds.items()},
        }
        for name in MANNERS
    }
    overall = {kind: as_figures(gain(scores, list(MANNERS), by)) for kind, by in kinds.items()}
    figures = {
        "people": each,
        "overall": overall,
        "everybody_else": everybody_else(model, people, tested),
        "weights_unchanged": hash_file(model / "model.safetensors") == weights,
        "tested": TESTED,
        "settings": SETTINGS.model_dump(mode="json"),
        "asked": {"own": OWN_GAIN, "strangers": STRANGER_GAIN},
    }
    print(json.dumps(figures, indent=1))

    def cells(found: Mapping[str, float]) -> list[Any]:
        return [100 * found["mean"], [100 * found["low"], 100 * found["high"]]]

    table = recording.table(
        [
            *(("likes", ""), ("by the base model", ".0%"), ("own adapter, points", "+.0f"), ("95 %", "+.0f")),
            *(("a stranger's", "+.1f"), ("95 %", "+.1f"), ("the opposite's", "+.0f"), ("used", "")),
        ],
        [
            [
                name,
                one["base"],
                *cells(one["own"]),
                *cells(one["strangers"]),
                100 * one["opposite"]["mean"],
                {"used": "yes"}.get(one["decision"], "rolled back"),
            ]
            for name, one in each.items()
        ],
    )
    print(recording.save("personal_adapters", figures, tables={"people": table}))


if __name__ == "__main__":
    main()
