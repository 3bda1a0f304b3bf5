"""The engine's loop: plan a step, compute it, choose tokens, hand them to their answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext

from torch import Tensor

from bessemer.core.errors import BessemerError, RequestError
from bessemer.inference.execution.batch import Batch, Executor
from bessemer.inference.execution.threads import one_thread
from bessemer.inference.request import Request
from bessemer.inference.sampling.logprobs import log_probs
from bessemer.inference.sampling.sampler import Sampled
from bessemer.inference.scheduling.schedule import ScheduledChunk
from bessemer.inference.scheduling.scheduler import Scheduler
from bessemer.inference.speculation.proposer import Draft, Proposer
from bessemer.inference.speculation.verification import verify_rows

# Shapes: R wanted rows, W those that a token is chosen from, V vocabulary.


class EngineCore:
    """Answers under way, one model. Whoever steps moves all of them on; nothing in it waits or locks."""

    def __init__(self, scheduler: Scheduler, executor: Executor, proposer: Proposer | None = None) -> None:
        self.scheduler, self.executor, self.proposer = scheduler, executor, proposer
        self._requests: dict[int, Request] = {}
        self._drafts: dict[int, Draft] = {}
        #: Since the start: steps, and tokens computed in them.
        self.steps = self.tokens = 0
        #: Since the start: guesses that were checked, and those that came true.
        self.guessed = self.right = 0

    @property
    def busy(self) -> bool:
        """Whether any answer is under way."""
        return bool(self._requests)

    def check(self, request: Request) -> None:
        """Raises RequestError when an answer can never fit in the memory."""
        self.scheduler.check(request.sequence)

    def add(self, request: Request) -> None:
        """Let an answer begin. Raises RequestError when it can never fit, or too many wait."""
        self.scheduler.add(request.sequence)
        self._requests[request.sequence.identity] = request

    def abort(self, request: Request) -> None:
        """Stop an answer that nobody waits for any more, and those to come beside it; its pages are free at once."""
        for each in (request, *request.siblings):
            if self._requests.pop(each.sequence.identity, None) is not None:
                self.scheduler.abort(each.sequence)
                self._forget(each)

    def step(self) -> None:
        """Compute one step of everything that is under way."""
        self._propose()
        begun = time.perf_counter()
        plan = self.scheduler.schedule()
        if not plan.works:
            assert not self.busy or plan.preempted, "answers wait and nothing is planned"
            return
        if plan.copies:
            self.executor.copy_blocks(plan.copies)
        if plan.restored:
            self.executor.restore_states(plan.restored)
        requests = [self._requests[work.sequence.identity] for work in plan.works]
        batch, rows = self._batch(plan.works, requests)
        self.steps += 1
        self.tokens += len(batch.tokens)
        try:
            logits_RV = self.executor.forward(batch)
        except Exception as error:  # the whole step, so everyone in it is told, and nothing of it stays planned
            told = error if isinstance(error, BessemerError) else RequestError(f"the step failed: {error}")
            for request in requests:
                self._end(request, told)
            if told is not error:
                raise
            return
        with one_thread() if self.executor.own_threads else nullcontext():
            found = self._choose(plan.works, requests, rows, logits_RV)
        kept = [
            (work.sequence.state_slot, len(tokens))
            for work, tokens in zip(plan.works, found, strict=True)
            if work.drafts and work.sequence.state_slot is not None and not isinstance(tokens, BessemerError)
        ]
        self.executor.keep_states(kept)
        for work, request, tokens in zip(plan.works, requests, found, strict=True):
            self._commit(work, request, tokens)
        # all that guesses make longer: pages for them, more rows, more to choose from, more text
        seconds = time.perf_counter() - begun
        if self.proposer is not None:
            self.proposer.computed(plan.works, requests)
            guesses = sum(work.drafts for work in plan.works)
            if len(batch.tokens) == len(plan.works) + guesses:  # no prompt was read
                self.proposer.measured(len(plan.works), guesses, seconds)

    def _propose(self) -> None:
        if self.proposer is None:
            return
        decoding = [
            request
            for request in self._requests.values()
            if request.sequence.status == "running" and len(request.sequence.tokens) - request.sequence.computed == 1
        ]
        self.proposer.crowded = self.scheduler.waiting > 0
        for request, draft in zip(decoding, self.proposer.propose(decoding), strict=True):
            request.sequence.draft = list(draft.tokens)
            self._drafts[request.sequence.identity] = draft

    def _batch(self, works: Sequence[ScheduledChunk], requests: Sequence[Request]) -> tuple[Batch, list[slice]]:
        """The executor's input, and which of its rows belong to each work."""
        batch = Batch([], [], [0], [[] for _ in self.scheduler.groups], [], [], [], [], [])
        rows = []
        for work, request in zip(works, requests, strict=True):
            sequence = work.sequence
            known = work.start + work.count - work.drafts
            batch.tokens += sequence.tokens[work.start : known]
            batch.tokens += sequence.draft[: work.drafts]
            batch.positions += range(work.start, work.start + work.count)
            end = len(batch.tokens)
            before = len(batch.wanted)
            # log-probabilities of the prompt need the logits of all its tokens
            count = work.count if _reads_prompt(work, request) else work.wants
            batch.wanted += range(end - count, end)
            rows.append(slice(before, len(batch.wanted)))
            batch.starts.append(end)
            for tables, table in zip(batch.tables, sequence.tables, strict=True):
                tables.append(table)
            if sequence.state_slot is not None:
                batch.slots.append(sequence.state_slot)
                batch.snapshots.append(sequence.snapshots)
            batch.drafts.append(work.drafts)
            batch.prompts.append(sequence.prompt_length)
            batch.adapters.append(request.adapter)
        return batch, rows

    def _choose(
        self, works: Sequence[ScheduledChunk], requests: Sequence[Request], rows: Sequence[slice], logits_RV: Tensor
    ) -> list[list[Sampled] | BessemerError]:
        """The tokens that each work gives, none where it ends inside a prompt; or why it can give none."""
        found: list[list[Sampled] | BessemerError] = [[] for _ in works]
        choosing: list[int] = []
        drafts: list[Draft] = []
        wanted: list[int] = []
        for index, (work, request, place) in enumerate(zip(works, requests, rows, strict=True)):
            if _reads_prompt(work, request):
                _note_prompt(work, request, logits_RV[place])
            if work.wants == 1 and request.is_probe:
                request.logits_V = logits_RV[place.stop - 1].clone()
                found[index] = [Sampled(0)]  # what it has room for, and ends with
            elif work.wants:
                choosing.append(index)
                drafts.append(self._drafts[work.sequence.identity].first(work.drafts) if work.drafts else Draft())
                wanted += range(place.stop - work.wants, place.stop)
        if choosing:
            # in the usual step every row is somebody's
            logits_WV = logits_RV if len(wanted) == len(logits_RV) else logits_RV[wanted]
            chosen = verify_rows(logits_WV, [requests[index].sampling for index in choosing], drafts)
            for index, draft, tokens in zip(choosing, drafts, chosen, strict=True):
                found[index] = tokens
                if draft.tokens and not isinstance(tokens, RequestError):
                    self._learn(requests[index], draft, tokens)
        return found

    def _learn(self, request: Request, draft: Draft, tokens: Sequence[Sampled]) -> None:
        """Note what became of a draft: an end token may be the last that came true, with nothing behind it."""
        assert self.proposer is not None
        guessed, right = len(draft.tokens), sum(one.token == guess for one, guess in zip(tokens, draft.tokens, strict=False))
        request.guessed, request.right = request.guessed + guessed, request.right + right
        self.guessed, self.right = self.guessed + guessed, self.right + right
        self.proposer.learn(request, guessed, right)

    def _commit(self, work: ScheduledChunk, request: Request, found: list[Sampled] | BessemerError) -> None:
        if isinstance(found, BessemerError):
            self._end(request, found)
            return
        if not found:
            self.scheduler.commit(work, [])
            return
        begins = not request.token_ids
        try:
            made = request.take(found)
        except RequestError as error:  # a token that the tokenizer does not have, where the model has more
            self._end(request, error)
            return
        self.scheduler.commit(work, made)
        if begins and request.siblings:
            self._fork(request)
        if request.done:
            self._end(request, None)

    def _fork(self, request: Request) -> None:
        """The prompt has been read: the other answers to it begin, on the same pages."""
        for sibling in request.siblings:
            if not sibling.done:  # an answer that failed may have ended this one before it began
                self.scheduler.fork(request.sequence, sibling.sequence)
                self._requests[sibling.sequence.identity] = sibling

    def _end(self, request: Request, error: BessemerError | None) -> None:
        if error is not None:
            request.fail(error)
            for sibling in request.siblings:  # those that have not begun never will
                if sibling.sequence.identity not in self._requests and not sibling.done:
                    sibling.fail(error)
        del self._requests[request.sequence.identity]
        self.scheduler.abort(request.sequence)
        self._forget(request)

    def _forget(self, request: Request) -> None:
        self._drafts.pop(request.sequence.identity, None)
        if self.proposer is not None:
            self.proposer.forget(request)


def _reads_prompt(work: ScheduledChunk, request: Request) -> bool:
    """Whether a work computes tokens of a prompt whose log-probabilities are wanted, and not known from before."""
    return (
        request.params.prompt_logprobs is not None
        and work.start < request.sequence.prompt_length
        and len(request.prompt_log_probs) < request.sequence.prompt_length - 1
    )


def _note_prompt(work: ScheduledChunk, request: Request, logits_NV: Tensor) -> None:
    """Log-probabilities of the prompt's tokens that follow those of a work; computed again after a preemption, taken once."""
    sequence, known = request.sequence, len(request.prompt_log_probs)
    first = max(work.start, known)
    end = min(work.start + work.count, sequence.prompt_length - 1)
    if first >= end:
        return
    following = sequence.tokens[first + 1 : end + 1]
    count = request.params.prompt_logprobs or 0
    found = log_probs(logits_NV[first - work.start : end - work.start], following, [count] * len(following))
    request.prompt_log_probs += [Sampled(token, one) for token, one in zip(following, found, strict=True)]
