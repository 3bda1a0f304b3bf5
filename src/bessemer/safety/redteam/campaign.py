"""A run of attacks: many attempts at once, each query answered in a batch with others', and a journal of every reply.

A resumed run plays the attempts again with the replies of the journal, which costs no query, and goes on behind them. A reply
is in the journal as soon as it is there, so that an interruption loses none.
"""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from bessemer.core.chat_client import ChatModel
from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.hashing import derive_seed, hash_value
from bessemer.core.progress import Progress, Task
from bessemer.core.store import check_format, read_json, write_json
from bessemer.safety.redteam.attacks import AttackContext, Judged, Play, Query
from bessemer.safety.redteam.config import ATTACKS, RedTeamConfig
from bessemer.safety.redteam.detectors import DETECTORS_VERSION, Ratings, Verdict, judged, verdict_on
from bessemer.safety.redteam.goals import Goal, goals_hash
from bessemer.safety.redteam.targets import Asked, Reply, Target

#: Files of a run's folder.
JOURNAL, SETTINGS_FILE, ATTEMPTS_FILE = "queries.jsonl", "settings.json", "attempts.jsonl"
#: Format number of these files.
FORMAT = 1
#: Most queries of an attempt; an attack that asks more is at fault.
_MOST_QUERIES = 20_000


@dataclass(frozen=True)
class Attempt:
    """One attack on one goal."""

    attack: str
    goal: Goal

    @property
    def name(self) -> str:
        """Unique in a run."""
        return f"{self.attack}/{self.goal.id}"


@dataclass(frozen=True)
class AttemptResult:
    """What an attempt came to.

    queries: of the target. verdict: of the answer that reached the goal, else of the last one; None where the target was not
    asked. at: the number of that query, from 1. prompt: its last message; answer: the target's.
    """

    attempt: Attempt
    queries: int
    verdict: Verdict | None
    at: int = 0
    prompt: str = ""
    answer: str = ""

    @property
    def is_success(self) -> bool:
        """Whether the goal was reached."""
        return self.verdict is not None and self.verdict.is_success

    def as_line(self) -> dict[str, Any]:
        """For `attempts.jsonl`."""
        goal, verdict = self.attempt.goal, self.verdict
        line = {"attack": self.attempt.attack, "goal": goal.id, "kind": goal.kind, "category": goal.category}
        if verdict is None:
            return {**line, "outcome": None, "success": False, "queries": self.queries}
        return {
            **line,
            "outcome": verdict.outcome,
            "success": verdict.is_success,
            "queries": self.queries,
            "at": self.at,
            "refusal": verdict.refusal,
            "fault": verdict.fault,
            "specific": round(verdict.specific, 4),
            "leak": verdict.leak,
            "recited": verdict.recited,
            "judge": None if verdict.ratings is None else {**verdict.ratings._asdict(), "score": verdict.ratings.score},
            "disagree": verdict.disagree,
            "prompt": self.prompt,
            "answer": self.answer,
        }


def attempts_of(config: RedTeamConfig, goals: Sequence[Goal], *, has_weights: bool) -> tuple[list[Attempt], list[str]]:
    """The attempts of a run in their order, and sentences about attacks that cannot be made.

    The plain requests come first, since every figure is compared with them; then the first goal of each category under every
    attack, then the second, so that a budget that ends early has touched everything.
    """
    notes, usable = [], []
    for name in config.attacks:
        attack = ATTACKS.find(name).load()
        if "white_box" in attack.needs and not has_weights:
            notes.append(f"{name}: it needs the model's weights, which a URL does not give")
        elif not any(goal.kind in attack.kinds and attack.applies(goal) for goal in goals):
            notes.append(f"{name}: none of the chosen goals is one that it can be tried on")
        else:
            usable.append((name, attack))
    ranks: dict[tuple[str, str], int] = {}
    ranked = []
    for goal in goals:
        place = (goal.kind, goal.category)
        ranks[place] = ranks.get(place, -1) + 1
        ranked.append((ranks[place], goal))
    ordered = [goal for _, goal in sorted(ranked, key=lambda pair: pair[0])]
    direct = [("direct", attack) for name, attack in usable if name == "direct"]
    others = [(name, attack) for name, attack in usable if name != "direct"]
    attempts = [Attempt(name, goal) for name, attack in direct for goal in ordered if goal.kind in attack.kinds]
    for goal in ordered:
        attempts += [Attempt(name, goal) for name, attack in others if goal.kind in attack.kinds and attack.applies(goal)]
    return attempts, notes


class StoredReply(NamedTuple):
    """A reply of the journal, and a judge's ratings of it. rated_by: the judge that was asked, "" where none was."""

    reply: Reply
    ratings: Ratings | None
    rated_by: str


class Journal:
    """The replies of a run, in its folder, by attempt and number of the query."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """identity: what the replies depend on. Raises ConfigError where the folder holds a run of another identity, or
        something else, ArtefactError for a file that is damaged."""
        self._path = folder / JOURNAL
        settings = folder / SETTINGS_FILE
        if settings.exists():
            before = read_json(settings, "file of a red team's settings")
            check_format(before.get("format"), FORMAT, settings, "file of a red team's settings")
            if (named := _difference(before["identity"], identity)) is not None:
                raise ConfigError(f"{folder}: holds a run with another {named}; name another folder with --out")
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder}: exists and holds something other than a red team's run; name another with --out")
        folder.mkdir(parents=True, exist_ok=True)
        self._lines = {(line["attempt"], line["number"]): line for line in self._read()}
        write_json(settings, {"format": FORMAT, "identity": identity})

    def __len__(self) -> int:
        """Queries of the target that were answered."""
        return sum(line["to"] == "target" for line in self._lines.values())

    def reply(self, attempt: str, number: int, asked: str) -> StoredReply | None:
        """What an attempt's query was answered; None where it was not yet. Raises ArtefactError for another query there."""
        line = self._lines.get((attempt, number))
        if line is None:
            return None
        if line["asked"] != asked:
            raise ArtefactError(f"{self._path}: query {number} of {attempt} is another one now; name another folder with --out")
        ratings = None if line["ratings"] is None else Ratings(*line["ratings"])
        return StoredReply(Reply(**line["reply"]), ratings, line["rated_by"])

    def add(self, line: Mapping[str, Any]) -> None:
        """Write a line, whole, and hand it to the system. A later line of the same query replaces an earlier one."""
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._lines[line["attempt"], line["number"]] = dict(line)

    def rate(self, attempt: str, number: int, judge: str, ratings: Ratings | None) -> None:
        """Add a judge's ratings to a reply, None where they could not be read."""
        line = self._lines[attempt, number]
        self.add({**line, "ratings": None if ratings is None else list(ratings), "rated_by": judge})

    def _read(self) -> Iterator[dict[str, Any]]:
        """The lines of the file. What an interruption left after the last line break is removed."""
        if not self._path.exists():
            return
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            self._path.write_bytes(whole)
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            try:
                record = json.loads(line)
                if not {"attempt", "number", "to", "asked", "reply", "ratings", "rated_by"} <= record.keys():
                    raise ValueError("keys are missing")
            except (ValueError, AttributeError) as error:
                raise ArtefactError(f"{self._path}, line {number}: this reply is damaged ({error})") from None
            yield record


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    return next((key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)), None)


def run_identity(config: RedTeamConfig, goals: Sequence[Goal], model: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """What the replies of a run depend on. The budget, the list of attacks and the judge do not belong to it: more may follow,
    and another judge rates the same replies."""
    return {
        "model": dict(model),
        "goals": goals_hash(goals),
        "attack_settings": {name: config.settings_of(name).model_dump(mode="json") for name in config.attack_settings},
        "system": config.system,
        "max_tokens": config.max_tokens,
        "temperature": config.temperature,
        "attacker": None if config.attacker is None else config.attacker.model,
        "detectors": DETECTORS_VERSION,
        "seed": seed,
    }


class _UnderWay:
    """An attempt that waits for the reply to its query."""

    def __init__(self, attempt: Attempt, play: Play, query: Query) -> None:
        self.attempt = attempt
        self.play = play
        self.query = query
        self.number = 0
        self.asked = 0
        self.result = AttemptResult(attempt, 0, None)


@dataclass(frozen=True)
class Campaign:
    """Attempts on a target. attacker, judge: models, None where there is none."""

    config: RedTeamConfig
    goals: Sequence[Goal]
    target: Target
    journal: Journal
    seed: int
    progress: Progress
    attacker: ChatModel | None = None
    judge: ChatModel | None = None

    def run(self, attempts: Sequence[Attempt], stop: Callable[[], bool] = lambda: False) -> list[AttemptResult]:
        """The results of the attempts that were finished, in their order.

        Ends early at the budget of queries, and where `stop` says so, between two batches.
        """
        waiting, spent = deque(attempts), 0
        active: list[_UnderWay] = []
        finished: dict[str, AttemptResult] = {}
        with self.progress.task("attack", total=len(attempts), unit="attempts") as bar:
            while waiting or active:
                while waiting and len(active) < self.target.at_once:
                    self._start(waiting.popleft(), active, finished, bar)
                replies = self._from_journal(active)
                if not replies and active:
                    left = self.target.at_once if self.config.budget is None else self.config.budget - spent
                    if left <= 0 or stop():
                        break
                    self._answer(self._next_batch(active, left))
                    continue
                spent += sum(one.query.to == "target" for one, _ in replies)
                for one, reply in replies:
                    self._send(one, reply, active, finished, bar)
        for one in active:
            one.play.close()
        return [finished[attempt.name] for attempt in attempts if attempt.name in finished]

    def _start(self, attempt: Attempt, active: list[_UnderWay], finished: dict[str, AttemptResult], bar: Task) -> None:
        context = AttackContext(
            self.config.settings_of(attempt.attack),
            random.Random(derive_seed(self.seed, "attack", attempt.name)),
            self.goals,
            self.config.system,
            self.attacker is not None,
            self.target.white_box,
        )
        play = ATTACKS.find(attempt.attack).load().play(attempt.goal, context)
        try:
            active.append(_UnderWay(attempt, play, self._with_system(next(play))))
        except StopIteration:
            finished[attempt.name] = AttemptResult(attempt, 0, None)
            bar.advance()

    def _with_system(self, query: Query) -> Query:
        has_system = bool(query.messages) and query.messages[0]["role"] == "system"
        if query.to != "target" or has_system or not self.config.system:
            return query
        return replace(query, messages=[{"role": "system", "content": self.config.system}, *query.messages])

    def _from_journal(self, active: Sequence[_UnderWay]) -> list[tuple[_UnderWay, Judged]]:
        """The attempts whose query is answered, with the verdicts. Replies that the judge has not rated yet are rated now."""
        stored = [(one, self.journal.reply(one.attempt.name, one.number, _query_hash(one.query))) for one in active]
        known = [(one, found) for one, found in stored if found is not None]
        name = "" if self.judge is None else "judge" if self.config.judge is None else self.config.judge.model
        ratings = {one.attempt.name: found.ratings if found.rated_by == name else None for one, found in known}
        if self.judge is not None:
            unrated = [(one, found.reply) for one, found in known if found.rated_by != name and _can_be_rated(one, found.reply)]
            given = judged(self.judge, [(one.attempt.goal.request, reply.text) for one, reply in unrated])
            for (one, _), rated in zip(unrated, given, strict=True):
                self.journal.rate(one.attempt.name, one.number, name, rated)
                ratings[one.attempt.name] = rated
        return [(one, self._judged(one, found.reply, ratings[one.attempt.name])) for one, found in known]

    def _next_batch(self, active: Sequence[_UnderWay], left: int) -> list[_UnderWay]:
        """Queries to one addressee: first what the target waits for, one search at a time; at most `left` of the target."""
        for addressee, most in (("search", 1), ("attacker", self.target.at_once), ("target", left)):
            batch = [one for one in active if one.query.to == addressee][: max(0, most)]
            if batch:
                break
        return batch

    def _answer(self, batch: Sequence[_UnderWay]) -> None:
        """Have queries to one addressee answered, and write each reply to the journal when it comes."""
        seeds = [derive_seed(self.seed, "query", one.attempt.name, one.number) for one in batch]
        addressee = batch[0].query.to
        if addressee == "search":
            for one, seed in zip(batch, seeds, strict=True):
                assert one.query.work is not None, "a search has its work"
                self._add(one, Reply(one.query.work(seed)))
        elif addressee == "attacker":
            assert self.attacker is not None, "an attack that needs an attacker is not begun without one"
            written = self.attacker.ask([list(one.query.messages) for one in batch], seeds)
            for one, text in zip(batch, written, strict=True):
                self._add(one, Reply(str(text)))
        else:
            queries = [one.query for one in batch]
            asked = [
                Asked(query.messages, seed, query.tools, query.temperature) for query, seed in zip(queries, seeds, strict=True)
            ]
            for place, reply in self.target.ask(asked):
                self._add(batch[place], reply)

    def _add(self, one: _UnderWay, reply: Reply) -> None:
        self.journal.add(
            {
                "attempt": one.attempt.name,
                "number": one.number,
                "to": one.query.to,
                "asked": _query_hash(one.query),
                "messages": list(one.query.messages),
                "reply": {
                    "text": reply.text,
                    "blocked": reply.blocked,
                    "error": reply.error,
                    **({"is_filtered": True} if reply.is_filtered else {}),
                },
                "ratings": None,
                "rated_by": "",
            }
        )

    def _judged(self, one: _UnderWay, reply: Reply, ratings: Ratings | None) -> Judged:
        if one.query.to != "target":
            return Judged(reply)
        if reply.error:
            return Judged(reply, Verdict("error", fault=reply.error))
        if reply.blocked:
            return Judged(reply, Verdict("blocked", reply.blocked))
        prompt = "\n".join(str(message.get("content") or "") for message in one.query.messages)
        verdict = verdict_on(one.attempt.goal, reply.text, prompt, ratings)
        if reply.is_filtered and verdict.outcome in ("unspecific", "incoherent"):
            # a filter's own words need not be a refusal's; what it let through counts as it is
            verdict = replace(verdict, outcome="blocked", refusal="content_filter")
        return Judged(reply, verdict)

    def _send(
        self, one: _UnderWay, judged_: Judged, active: list[_UnderWay], finished: dict[str, AttemptResult], bar: Task
    ) -> None:
        """Give an attempt its reply; it then waits for the next one, or is finished."""
        if judged_.verdict is not None:
            one.asked += 1
            if not one.result.is_success:
                last = str(one.query.messages[-1].get("content") or "")
                one.result = AttemptResult(one.attempt, one.asked, judged_.verdict, one.asked, last, judged_.text)
            one.result = replace(one.result, queries=one.asked)
        one.number += 1
        try:
            if one.number >= _MOST_QUERIES:
                one.play.close()
                raise StopIteration
            one.query = self._with_system(one.play.send(judged_))
        except StopIteration:
            active.remove(one)
            finished[one.attempt.name] = one.result
            bar.advance()


def _can_be_rated(one: _UnderWay, reply: Reply) -> bool:
    """Whether a judge rates a reply: the target's to requests alone, since leaks are read exactly."""
    is_request = one.query.to == "target" and one.attempt.goal.kind in ("behaviour", "harmless")
    return is_request and not reply.error and not reply.blocked


def _query_hash(query: Query) -> str:
    return hash_value([query.to, list(map(dict, query.messages)), list(query.tools), query.temperature], bits=64)
