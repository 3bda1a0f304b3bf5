"""The assistant's turns on the engine of a server: several answers to one conversation, each to the end of its turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import NamedTuple

from bessemer.assistant.events import Event
from bessemer.assistant.generation import Delta, Generation
from bessemer.assistant.turn import Turn
from bessemer.inference.request import Request
from bessemer.inference.sampling.params import SamplingParams
from bessemer.inference.sampling.sampler import Sampled
from bessemer.serving.clients import Caller
from bessemer.serving.worker import Worker

#: Makes a request of a prompt and its settings that has not begun.
Prepare = Callable[[Sequence[int], SamplingParams], Request]


class ChoiceEvents(NamedTuple):
    """What a step adds to one of several answers: events of its turn, the tokens that were sampled with their
    log-probabilities, where these were asked for, and the ids of all of them."""

    choice: int
    events: Sequence[Event]
    sampled: Sequence[Sampled]
    token_ids: Sequence[int] = ()


@dataclass
class _Withheld:
    """Tokens of a message that a hook has not let pass: they, and how likely they were, are the text in another form."""

    sampled: list[Sampled] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)


class Turns:
    """Turns that answer one conversation, and what they need of the engine.

    They go on in rounds: in the first one request makes all answers, so that the prompt is read once; the turns that then need
    another completion, behind a thinking budget or the results of tools, share the next round.
    """

    def __init__(self, turns: Sequence[Turn], prepare: Prepare, caller: Caller) -> None:
        """turns: have begun, all with the same prompt. caller: whose tokens they use. Raises RequestError where the engine
        refuses the prompt."""
        self._turns = turns
        self._prepare = prepare
        self._caller = caller
        first = turns[0].generation
        assert first is not None, "a turn that has begun needs a completion"
        self.prompt_ids = list(first.token_ids)
        #: Requests of the round, and of each of their completions the turn and the generation that it is for.
        self._requests = [prepare(first.token_ids, first.params.with_changes(n=len(turns)))]
        self._first = self._requests[0]
        self._owners = self._owners_of(range(len(turns)))
        self._withheld = [_Withheld() for _ in turns]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_ids)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were found in the prefix cache."""
        return self._first.cached_tokens

    @property
    def completion_tokens(self) -> int:
        """Tokens sampled in all turns that are over."""
        return sum(turn.end.completion_tokens for turn in self._turns if turn.end is not None)

    async def stream(self, worker: Worker) -> AsyncGenerator[list[ChoiceEvents], None]:
        """Events as they come, to the end of all turns. Closing or cancelling it ends the requests. Raises as `Worker`."""
        while self._requests:
            async with aclosing(worker.chunks(self._requests, self._caller)) as news:
                async for chunks in news:
                    told = []
                    for place, chunk in chunks:
                        choice, generation = self._owners[place]
                        turn = self._turns[choice]
                        # a turn that a hook sent back has no use for the rest
                        if turn.generation is generation:
                            told.append(self._taken(choice, chunk.token_ids, chunk.finish_reason, chunk.log_probs or ()))
                    if told:
                        yield told
                    if all(self._turns[choice].generation is not generation for choice, generation in self._owners):
                        break
            if told := await self._go_on():
                yield told

    async def finish(self, worker: Worker) -> list[ChoiceEvents]:
        """All events, without waiting for every token. Raises as `Worker.chunks`."""
        told = []
        while self._requests:
            params = [generation.params for _, generation in self._owners]
            shared = params[0].with_changes(n=len(self._owners) // len(self._requests))
            whole = await worker.complete(self._requests, shared, self._caller)
            completions = [one for first in whole for one in (first, *first.others)]
            for (choice, generation), completion in zip(self._owners, completions, strict=True):
                assert self._turns[choice].generation is generation
                sampled = completion.log_probs or ()
                told.append(self._taken(choice, completion.token_ids, completion.finish_reason, sampled))
            told += await self._go_on()
        return told

    def _taken(
        self, choice: int, token_ids: Sequence[int], finish_reason: str | None, sampled: Sequence[Sampled]
    ) -> ChoiceEvents:
        """Give a turn what was sampled for it. Where a hook holds back, the tokens are told with the text that they are, and
        those of a message that is sent back never."""
        turn, withheld = self._turns[choice], self._withheld[choice]
        before = turn.sent_back
        events = turn.take(Delta(token_ids, finish_reason=finish_reason))
        if turn.sent_back > before:
            self._withheld[choice] = _Withheld()
            return ChoiceEvents(choice, events, ())
        if not turn.holds_back:
            return ChoiceEvents(choice, events, sampled, token_ids)
        withheld.sampled += sampled
        withheld.token_ids += token_ids
        if not events:
            return ChoiceEvents(choice, events, ())
        self._withheld[choice] = _Withheld()
        return ChoiceEvents(choice, events, withheld.sampled, withheld.token_ids)

    async def _go_on(self) -> list[ChoiceEvents]:
        """Run the tools of this machine that were called, and prepare the requests of the next round; what the tools gave."""
        told, choices = [], []
        for choice, turn in enumerate(self._turns):
            while turn.wants_tools:
                told.append(ChoiceEvents(choice, await asyncio.to_thread(turn.run_tools), ()))
            if turn.end is None:
                choices.append(choice)
        self._owners = self._owners_of(choices)
        self._requests = [self._prepare(generation.token_ids, generation.params) for _, generation in self._owners]
        return told

    def _owners_of(self, choices: Sequence[int]) -> list[tuple[int, Generation]]:
        found = []
        for choice in choices:
            generation = self._turns[choice].generation
            assert generation is not None, "a turn that is not over needs a completion"
            found.append((choice, generation))
        return found
