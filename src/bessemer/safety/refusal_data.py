"""Conversations that teach a model a policy: refusals, safe completions, and look-alikes that are to be answered.

    python -m bessemer.safety.refusal_data rows.jsonl --policy policy.yaml --model smollm2   # for the stage `sft`

Requests are drawn from the seeds of the guard's classifier. What is said to them follows from the policy: a category that
prompts or answers are refused for is refused, one of which the answer is written anew is completed safely, and of what is
allowed, logged or blacked out no row is made. The requests beside them have the words of hazards in a harmless sense, and come
in the same frames and wrappers, so that neither a word nor a form tells what to refuse.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bessemer.core.errors import BessemerError, ConfigError
from bessemer.core.hashing import derive_seed
from bessemer.core.policy import Policy, read_policy
from bessemer.core.store import write_text
from bessemer.safety.classifier_training import Seeds, expanded, packaged_seeds

Kind = Literal["refuse", "safe_completion", "answer"]
#: What a safe completion offers behind what it leaves out.
OFFER = "I can tell you which dangers there are, what the law says about it, and who helps."


@dataclass(frozen=True)
class Request:
    """Something that somebody asks. category: the hazard's, empty of a look-alike. family: the wrapper's, empty where plain."""

    text: str
    kind: Kind
    category: str = ""
    family: str = ""


def taught(policy: Policy, category: str) -> Kind | None:
    """How a policy answers requests of a category: by the severer action of the surfaces `prompt` and `answer`; None where it
    lets them pass."""
    actions = {policy.action("prompt", category), policy.action("answer", category)}
    return "refuse" if "refuse" in actions else "safe_completion" if "safe_completion" in actions else None


def reply_of(policy: Policy, request: Request) -> str:
    """What a model is to say to a harmful request: the category's words, or the policy's with what it is about."""
    category = policy.categories[request.category]
    said = category.refusal or f"{policy.messages.refusal} It touches on {category.meaning}."
    return f"{said} {OFFER}" if request.kind == "safe_completion" else said


def harmful_requests(
    policy: Policy,
    seeds: Seeds,
    *,
    of_category: int,
    wrapped: float = 0.4,
    seed: int = 0,
    left_out: Callable[[str], bool] = lambda pattern: False,
) -> list[Request]:
    """English requests of each category that the policy does not let pass, at most `of_category`, spread over its patterns.

    wrapped: share of them in a wrapper of the seeds. left_out: patterns that are not drawn from, such as those near a test.
    Raises ConfigError where the policy lets all categories of the seeds pass.
    """
    found: list[Request] = []
    for category, languages in seeds.hazards.items():
        kind = taught(policy, category) if category in policy.categories else None
        if kind is None:
            continue
        draw = random.Random(derive_seed(seed, "harmful", category))
        actions = _spread([one for one in languages["en"] if not left_out(one)], of_category, draw)
        found += [Request(text, kind, category, family) for text, family in _asked(actions, seeds, wrapped, draw)]
    if not found:
        raise ConfigError(f"the policy {policy.name!r} refuses no category of the seeds, so there is nothing to teach")
    return found


def look_alikes(seeds: Seeds, count: int, *, wrapped: float = 0.4, seed: int = 0) -> list[Request]:
    """At most `count` English requests to answer: harmless ones in the frames and wrappers of the harmful, and whole sentences,
    which are a fifth."""
    draw = random.Random(derive_seed(seed, "look-alikes"))
    actions = _spread(seeds.harmless["en"], count - count // 5, draw)
    sentences = _spread(seeds.harmless["sentences"], count // 5, draw)
    asked = [*_asked(actions, seeds, wrapped, draw), *((text.replace("{{", "{"), "") for text in sentences)]
    return [Request(text, "answer", family=family) for text, family in asked]


def _spread(patterns: Sequence[str], count: int, draw: random.Random) -> list[str]:
    """At most `count` texts, of each pattern about as many."""
    if not patterns:
        return []
    texts = [expanded(pattern, -(-count // len(patterns)) + 1, draw) for pattern in patterns]
    for of_pattern in texts:
        draw.shuffle(of_pattern)
    order = [of_pattern[turn] for turn in range(max(map(len, texts))) for of_pattern in texts if turn < len(of_pattern)]
    return [*dict.fromkeys(order)][:count]


def _asked(actions: Sequence[str], seeds: Seeds, wrapped: float, draw: random.Random) -> list[tuple[str, str]]:
    """Requests for these infinitives, and the families of their wrappers."""
    usable = [
        (family, text)
        for family, texts in seeds.wrappers.items()
        for text in texts
        if "{request}" in text or "{action}" in text
    ]
    found = []
    for action in actions:
        text, family = draw.choice(seeds.frames["en"]), ""
        if usable and draw.random() < wrapped:
            family, wrapper = draw.choice(usable)
            text = wrapper.replace("{request}", text)
        found.append((text.replace("{{", "{").replace("}}", "}").replace("{action}", action), family))
    return found


def row_of(prompt: str, answer: str, kind: str, category: str = "") -> dict[str, Any]:
    """A row of the stage `sft`."""
    said = {"role": "assistant", "content": answer}
    return {"prompt": [{"role": "user", "content": prompt}], "completion": [said], "kind": kind, "category": category}


def policy_rows(policy: Policy, requests: Sequence[Request]) -> list[dict[str, Any]]:
    """Rows of harmful requests with what the policy says to them."""
    return [row_of(one.text, reply_of(policy, one), one.kind, one.category) for one in requests]


def held_back(seeds: Seeds, families: Collection[str]) -> Seeds:
    """The seeds without some families of wrappers. Raises ConfigError for a family that they do not have."""
    if unknown := sorted({*families} - {*seeds.wrappers}):
        raise ConfigError(f"the seeds have no family of wrappers {unknown[0]!r}; they have {', '.join(seeds.wrappers)}")
    return seeds.without(families)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write rows: what the policy says to harmful requests, and a model's own answers to look-alikes."""
    from bessemer.inference.chat import EngineChat
    from bessemer.inference.engine import Engine
    from bessemer.model.formats import packaged_smollm2

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--policy", type=Path, help="absent: Bessemer's own")
    parser.add_argument("--model", default="smollm2", help="the model that answers look-alikes, and is to be tuned")
    parser.add_argument("--of-category", type=int, default=32, help="harmful requests of a category")
    parser.add_argument("--max-tokens", type=int, default=96, help="of an answer; a longer one is left out")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    policy, seeds = read_policy(given.policy), packaged_seeds()
    harmful = harmful_requests(policy, seeds, of_category=given.of_category, seed=given.seed)
    harmless = look_alikes(seeds, len(harmful), seed=given.seed)
    place = packaged_smollm2() if given.model == "smollm2" else Path(given.model)
    with Engine(place) as engine:
        answers = EngineChat(engine, max_tokens=given.max_tokens).ask([one.text for one in harmless])
    # what was cut is not learnt: its end would be the end of an answer
    finished = [(one, said) for one, said in zip(harmless, answers, strict=True) if said and type(said) is str]
    rows = [*policy_rows(policy, harmful), *(row_of(one.text, said, one.kind) for one, said in finished)]
    random.Random(given.seed).shuffle(rows)
    write_text(given.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{len(rows):,} rows: {len(harmful):,} by the policy, {len(finished):,} answered")


if __name__ == "__main__":
    try:
        main()
    except BessemerError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
