"""Critique and revision of answers (Bai et al. 2022, arXiv 2212.08073, section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bessemer.core.chat_client import ChatModel, CutText
from bessemer.core.policy import Principle
from bessemer.posttraining.chat_models.config import CUT_REASON
from bessemer.posttraining.constitution.detectors import babbles
from bessemer.posttraining.formats import Message

#: Said behind a principle's own words.
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
    """Each answer after a critique and a revision by each of its drawn principles, one behind the other.

    critic: sees the conversation, the answer as its own, and is asked to criticise it, then to write it anew. drawn: names of
    principles, as many for each answer. seeds: of what a critic at a temperature samples.

    A row is dropped whose answer, critique or revision says nothing, as one that the critic's context does not hold, whose
    revision babbles or is cut, or whose critic says the same twice. A critique that is cut is criticism all the same.
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
    """Why a row is dropped; empty where it is not. is_cut: of the revision."""
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
