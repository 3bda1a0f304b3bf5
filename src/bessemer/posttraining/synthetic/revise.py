"""The stage `revise`: a model's answers, criticised and rewritten by principles, to be tuned on (Bai et al. 2022, arXiv
2212.08073, section 3).

Detectors mark answers before and after as a refusal, a hazard by its words, or babble. They are fast, made for English, and do
not judge meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bessemer.core.chat_client import ChatModel, CutText
from bessemer.core.hashing import derive_seed
from bessemer.core.policy import Policy, Principle, SurfaceName
from bessemer.core.progress import Progress, Silent
from bessemer.core.statistics import paired_difference
from bessemer.data.filters.word_list_scores import hazards
from bessemer.data.text.texts import Texts
from bessemer.data.word_lists.term_matcher import packaged_term_matcher
from bessemer.posttraining.chat_models import CUT_REASON
from bessemer.posttraining.data.formats import Message
from bessemer.posttraining.synthetic.config import ReviseConfig
from bessemer.posttraining.synthetic.constitution import OpenPrompt, Speakers, answered, drawn_principles, work_through

#: First characters of an answer in which a refusal is looked for; later words are about something else.
_BEGINNING = 160
#: Fewest words of an answer that is checked for repetition.
_FEWEST_WORDS = 8
#: Share of different runs of three words, and of words with a letter or digit, below which an answer is babble.
_LEAST_DIFFERENT, _LEAST_READABLE = 0.5, 0.5
#: Longest word; a longer run of characters, unless an address, marks babble.
_LONGEST_WORD = 60


@dataclass(frozen=True)
class Finding:
    """Detectors' findings on an answer. hazards: categories that the policy does not allow."""

    refuses: bool
    hazards: tuple[str, ...]
    babbles: bool

    @property
    def is_hazard(self) -> bool:
        """Whether the answer falls into a category that the policy does not allow."""
        return bool(self.hazards)


def findings(texts: Sequence[str], policy: Policy, surface: SurfaceName = "answer") -> list[Finding]:
    """Detectors' findings on texts, for a surface of a policy.

    Hazards are those of the score `hazards` (docs/scores.md), by the limits of the policy's categories of the same names.
    """
    whole = [_encodable(text) for text in texts]
    categories = policy.acted_on(surface)
    scores = {
        name: np.asarray(column)
        for name, column in ((key.removeprefix("hazards_"), value) for key, value in hazards(Texts.of(whole)).items())
        if name in categories
    }
    refusals, _ = packaged_term_matcher("refusals").count(Texts.of([text.strip()[:_BEGINNING] for text in whole]))
    return [
        Finding(
            refuses=bool(refusals[row].any()),
            hazards=tuple(name for name, values in scores.items() if values[row] >= categories[name].limit),
            babbles=babbles(text),
        )
        for row, text in enumerate(whole)
    ]


def babbles(text: str) -> bool:
    """Whether a text is babble: it has too few letters and digits, impossible words, or repeats itself."""
    words = text.split()
    readable = [any(sign.isalnum() for sign in word) for word in words]
    if not any(readable) or any(len(word) > _LONGEST_WORD and "://" not in word for word in words):
        return True
    if len(words) < _FEWEST_WORDS:
        return False
    runs = [tuple(words[start : start + 3]) for start in range(len(words) - 2)]
    return len(set(runs)) < _LEAST_DIFFERENT * len(runs) or sum(readable) < _LEAST_READABLE * len(words)


def _encodable(text: str) -> str:
    """The text without unpaired surrogates, which UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode("utf-8")


#: Appended to a principle.
_CRITICISE = "Criticise in a few sentences, and do not write the answer anew."
_REVISE = "Give the new answer alone, without a word about what you changed."


@dataclass(frozen=True)
class Round:
    """A critique by a principle, and the answer that was written after it."""

    principle: str
    critique: str
    revision: str


@dataclass(frozen=True)
class Revised:
    """An answer and its rounds. dropped: why it has no revision; empty where it has one."""

    answer: str
    rounds: tuple[Round, ...] = ()
    dropped: str = ""

    @property
    def revision(self) -> str:
        """The answer after the last round."""
        return self.rounds[-1].revision if self.rounds else self.answer


def revise_answers(
    critic: ChatModel,
    prompts: Sequence[Sequence[Message]],
    answers: Sequence[str],
    drawn: Sequence[Sequence[str]],
    principles: Mapping[str, Principle],
    seeds: Sequence[int],
) -> list[Revised]:
    """Each answer after a critique and a revision by each of its drawn principles, in turn. critic: gets the conversation with
    the answer as its own, and is asked to criticise it, then to rewrite it. drawn: names of principles, equally many for each
    answer. seeds: for a critic that samples at a temperature. A row is dropped if its answer, critique or revision is empty,
    for example because it exceeds the critic's context; if its revision babbles or is cut; or if the critic says the same
    twice. A critique that is cut is criticism all the same.
    """
    revised = [Revised(answer, dropped="" if answer.strip() else "no answer") for answer in answers]
    for number in range(max(map(len, drawn), default=0)):
        rows = [row for row, one in enumerate(revised) if not one.dropped]
        names = [drawn[row][number] for row in rows]
        of_round = [seeds[row] + number for row in rows]
        conversations: list[list[Message]] = [
            [
                *prompts[row],
                _said("assistant", revised[row].revision),
                _said("user", f"{principles[name].critique} {_CRITICISE}"),
            ]
            for row, name in zip(rows, names, strict=True)
        ]
        critiques = critic.ask(conversations, of_round)
        for conversation, critique, name in zip(conversations, critiques, names, strict=True):
            conversation += [_said("assistant", critique), _said("user", f"{principles[name].revision} {_REVISE}")]
        revisions = critic.ask(conversations, of_round)
        for row, name, critique, revision in zip(rows, names, critiques, revisions, strict=True):
            before = revised[row]
            rounds = (*before.rounds, Round(name, critique.strip(), revision.strip()))
            revised[row] = Revised(before.answer, rounds, _reason(rounds[-1], isinstance(revision, CutText)))
    return revised


def _reason(last: Round, is_cut: bool) -> str:
    """Why a row is dropped; empty if it is not. is_cut: whether the revision was cut."""
    if not last.critique:
        return "no critique"
    if is_cut:
        return CUT_REASON
    if not last.revision:
        return "no revision"
    if last.revision == last.critique:
        return "the revision is the critique"
    return "babble" if babbles(last.revision) else ""


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


#: The file of rows that `sft` reads.
REVISIONS_FILE = "revisions.jsonl"
#: Name of the metric → detector. Babble has none: such revisions are left out.
_DETECTED: Mapping[str, Callable[[Finding], bool]] = {
    "hazard": lambda finding: finding.is_hazard,
    "refusal": lambda finding: finding.refuses,
}


def revise(
    config: ReviseConfig,
    model: Path,
    out: Path,
    *,
    seed: int,
    device: str = "auto",
    progress: Progress | None = None,
    folder: Path = Path(),
) -> dict[str, Any]:
    """Write answers of the model of a folder, revised by a policy's principles; continues after the rows in `out`.

    Writes `revisions.jsonl` below `out`: {prompt, completion} with the revision as the completion, and beside it the first
    answer, the principles, the critiques and the critic. Files that the settings name are relative to `folder`. Returns the
    headline metrics: rates that detectors find before and after, with the interval of their difference. Raises SourceError for
    prompts that are malformed and where no answer could be revised, ConfigError for the policy and the critic, ApiError where
    a critic at a URL fails for good.
    """
    worked = work_through(
        config,
        model,
        out / REVISIONS_FILE,
        partial(_revised_rows, config, seed),
        description="revise",
        unit="prompts",
        without_any="answers could be revised",
        internal=("dropped",),
        seed=seed,
        device=device,
        progress=progress or Silent(),
        folder=folder,
    )
    kept = worked.kept
    before, after = (findings([row[name] for row in kept], worked.policy) for name in ("answer", "completion"))
    return {
        "prompts": len(worked.rows),
        "revisions": len(kept),
        "dropped": worked.dropped,
        "reasons": worked.reasons,
        "policy": worked.policy.hash,
        "changed_share": sum(row["answer"] != row["completion"] for row in kept) / len(kept),
        **rates(before, after),
    }


def _revised_rows(
    config: ReviseConfig,
    seed: int,
    speakers: Speakers,
    policy: Policy,
    prompts: Sequence[OpenPrompt],
    rows: Sequence[int],
) -> list[dict[str, Any]]:
    chosen = [prompts[row] for row in rows]
    answers = [of_row[0].text for of_row in answered(speakers, chosen, rows, 1, seed)]
    principles = policy.chosen_principles(config.principles)
    revisions = revise_answers(
        speakers.critic,
        [one.prompt for one in chosen],
        answers,
        [drawn_principles(principles, seed, row, config.rounds) for row in rows],
        principles,
        [derive_seed(seed, "revise", row) for row in rows],
    )
    critic = None if config.critic is None else config.critic.model
    return [_record(one, revised, critic) for one, revised in zip(chosen, revisions, strict=True)]


def _record(prompt: OpenPrompt, revised: Revised, critic: str | None) -> dict[str, Any]:
    return {
        "prompt": list(prompt.prompt),
        "completion": revised.revision,
        "answer": revised.answer,
        "principles": [one.principle for one in revised.rounds],
        "critiques": [one.critique for one in revised.rounds],
        "critic": critic,
        "dropped": revised.dropped,
    }


def rates(before: Sequence[Finding], after: Sequence[Finding]) -> dict[str, Any]:
    """Shares of answers that detectors find, before and after, and the ends of the 95 % interval of the difference."""
    metrics: dict[str, Any] = {}
    for name, tells in _DETECTED.items():
        first, second = ([float(tells(one)) for one in findings] for findings in (before, after))
        low, high = paired_difference(second, first).interval(bounds=(-1.0, 1.0))
        metrics |= {
            f"{name}_before_share": sum(first) / len(first),
            f"{name}_after_share": sum(second) / len(second),
            f"{name}_difference_low": low,
            f"{name}_difference_high": high,
        }
    return metrics
