"""Several rollout servers as one engine. A request goes to the least busy server, and to another one if that fails; a server
that comes back gets the newest weights before it gets requests.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from bessemer.core.concurrency import DaemonThreads
from bessemer.core.errors import BessemerError, ConfigError
from bessemer.core.http_client import ApiError, TransientError, wait_before
from bessemer.inference.images import PicturePrompt
from bessemer.inference.offline import LogProbsMode, Rollouts, params_of_prompts
from bessemer.inference.request import Prompts, as_prompts
from bessemer.inference.sampling.params import SamplingParams
from bessemer.posttraining.sampling.server_client import CompletionServer, ServedCompletion, WeightUpdate
from bessemer.posttraining.sampling.server_config import RolloutServers
from bessemer.tokenization.tokenizer import Tokenizer

#: Seconds before a failed server is tried again, doubled with each failure; and before a busy one gets the request again.
_FIRST_WAIT, _BUSY_WAIT = 1.0, 0.05

# Shapes: P prompts, R rows (P · n), T tokens of the longest row.


@dataclass(eq=False)
class _Member:
    """A server of the pool. failures: number since it last worked. retry_at: when it is tried again; None while it works."""

    server: CompletionServer
    sending: threading.Lock = field(default_factory=threading.Lock)
    under_way: int = 0
    failures: int = 0
    retry_at: float | None = None
    reason: str = ""

    @property
    def works(self) -> bool:
        return self.retry_at is None


class ServerPool:
    """An engine whose completions come from servers. Any number of threads may request completions; one thread sends
    weights."""

    def __init__(
        self,
        settings: RolloutServers,
        tokenizer: Tokenizer,
        say: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        first_wait: float = _FIRST_WAIT,
    ) -> None:
        """say: prints a line for the user. Raises ConfigError for a malformed URL."""
        self._settings = settings
        self._say = say
        self._clock = clock
        self._first_wait = first_wait
        self._tokenizer = tokenizer
        self._members = [_Member(CompletionServer(url, settings, tokenizer)) for url in settings.servers]
        self._changed = threading.Condition()
        self._update: WeightUpdate | None = None
        self._watcher: threading.Thread | None = None
        self._is_closed = False
        self._fatal: BessemerError | None = None
        #: When a server last answered.
        self._answered_at = clock()
        #: Most requests at once.
        self.concurrency = settings.concurrency * len(self._members)
        self._threads = DaemonThreads(self.concurrency, "completion")

    # -- interface

    @property
    def reads_folders(self) -> bool:
        """Whether a server takes weights from a folder."""
        return any(member.server.reads_folders for member in self._members)

    @property
    def context_length(self) -> int | None:
        """The most tokens of prompt and completion that every server takes, where known."""
        known = [length for member in self._members if (length := member.server.context_length) is not None]
        return min(known, default=None)

    def open(self, *, temperature: float, longest: int) -> None:
        """Connect to the servers. Waits for the first one; the others may come later, which is watched in the background.

        temperature: of the samples; longest: tokens of prompt and completion. Raises ConfigError for a server that gives
        log-probabilities of another temperature or has a shorter context, ApiError where none answers in time.
        """
        for member in self._members:
            try:
                self._connect(member, temperature, longest)
            except TransientError as error:
                self._fail(member, error)
        self._wait_for_one()
        lines = [f"{member.server.url} ({member.server.kind})" for member in self._members if member.works]
        self._say(f"  rollouts are sampled by {', '.join(lines)}")

    def complete(self, ids: Sequence[int], number: int, params: SamplingParams) -> list[ServedCompletion]:
        """`number` completions of a prompt by the least busy server; another one gets the request if that fails. Raises
        ApiError for a request that a server refuses, and where no server has answered for `patience` seconds.
        """
        while True:
            member = self._take()
            failure: TransientError | None = None
            try:
                sent = member.server.version
                completions = member.server.complete(ids, number, params)
                if sent >= 0 and min(min(one.versions) for one in completions) < sent:
                    # the server was restarted, and has the weights of its folder
                    failure = TransientError("has other weights than it was sent: it was started again")
                else:
                    return completions
            except TransientError as error:
                failure = error
            except ApiError as error:
                if error.status != 404 or member.server.adapter is None:
                    raise
                failure = TransientError("has lost the adapter: it was started again")
            finally:
                self._give_back(member, answered=failure is None or failure.is_busy)
            if failure.is_busy:
                time.sleep(max(_BUSY_WAIT, min(failure.wait or 0.0, 1.0)))
            else:
                self._fail(member, failure)

    def rollouts(
        self,
        prompts: Prompts,
        n: int,
        params: SamplingParams | Sequence[SamplingParams],
        *,
        logprobs_mode: LogProbsMode = "temperature",
        adapter: str | None = None,
    ) -> Rollouts:
        """As `Engine.rollouts`, for prompts of token ids; the adapter is the one that the servers have got. Raises as
        `complete`."""
        assert logprobs_mode == "temperature", "servers give log-probabilities at the temperature of the samples"
        listed = as_prompts(prompts)
        each = params_of_prompts(params, len(listed), n, logprobs_mode)
        ids = [list(map(int, prompt)) for prompt in listed if not isinstance(prompt, str | PicturePrompt)]
        assert len(ids) == len(listed), "servers are sent token ids"
        calls: list[Future[list[ServedCompletion]]] = [
            self._threads.submit(lambda prompt=prompt, own=own: self.complete(prompt, n, own))  # type: ignore[misc]
            for prompt, own in zip(ids, each, strict=True)
        ]
        return collect_served(ids, [call.result() for call in calls])

    def send_weights(self, update: WeightUpdate) -> None:
        """Send all servers new weights; one that fails gets them when it is back. update: its tensors must stay unchanged until
        the next update. Returns when every working server has them. Raises ApiError where one refuses them, and as `complete`
        where none works.
        """
        with self._changed:
            self._update = update
            working = [member for member in self._members if member.works]
        senders = [self._in_thread(lambda member=member: self._bring_up_to_date(member)) for member in working]  # type: ignore[misc]
        for member, sender in zip(working, senders, strict=True):
            try:
                sender.result()
            except TransientError as error:
                self._fail(member, error)
        self._wait_for_one()

    def close(self) -> None:
        """Send no more requests. Those in progress end when their servers notice that this process has ended."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._threads.close()

    # -- members

    def _take(self) -> _Member:
        """The working server with the fewest requests under way, when one is free."""
        with self._changed:
            while True:
                self._check_open()
                free = [m for m in self._members if m.works and m.under_way < self._settings.concurrency]
                if free:
                    member = min(free, key=lambda member: member.under_way)
                    member.under_way += 1
                    return member
                self._changed.wait(1.0)

    def _give_back(self, member: _Member, *, answered: bool) -> None:
        with self._changed:
            member.under_way -= 1
            if answered:
                member.failures = 0
                self._answered_at = self._clock()
            self._changed.notify_all()

    def _fail(self, member: _Member, error: TransientError) -> None:
        """Send a server no requests until it is back."""
        with self._changed:
            if not member.works:
                return
            member.failures += 1
            member.reason = str(error)
            member.retry_at = self._clock() + wait_before(member.failures, error, self._first_wait)
            member.server.version = -1
            others = sum(other.works for other in self._members)
            then = f"{others} of {len(self._members)} servers are left" if others else "no other is left, and it is waited for"
            self._say(f"  {member.server.url} {error}; {then}")
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._watch, name="server watcher", daemon=True)
                self._watcher.start()
            self._changed.notify_all()

    def _watch(self) -> None:
        """Try failed servers again when their waiting time is over."""
        while True:
            with self._changed:
                if self._is_closed:
                    return
                now = self._clock()
                due = [member for member in self._members if member.retry_at is not None and member.retry_at <= now]
                if not due:
                    self._changed.wait(min(0.2, self._first_wait))
                    continue
            for member in due:
                self._revive(member)

    def _revive(self, member: _Member) -> None:
        try:
            member.server.connect()
            self._bring_up_to_date(member)
        except TransientError as error:
            with self._changed:
                member.failures += 1
                member.reason = str(error)
                member.retry_at = self._clock() + wait_before(member.failures, error, self._first_wait)
            return
        except BessemerError as error:
            with self._changed:
                # another kind of server answers at this URL, which waiting does not change
                self._fatal = error
                self._changed.notify_all()
            return
        with self._changed:
            member.retry_at = None
            self._answered_at = self._clock()
            self._say(f"  {member.server.url} is back")
            self._changed.notify_all()

    def _bring_up_to_date(self, member: _Member) -> None:
        """Send a server the newest weights, and those that arrive meanwhile."""
        with member.sending:
            while (update := self._update) is not None and member.server.version != update.version:
                member.server.send_weights(update)

    def _wait_for_one(self) -> None:
        with self._changed:
            while not any(member.works for member in self._members):
                self._check_open()
                self._changed.wait(0.2)

    def _check_open(self) -> None:
        """Raises ApiError where no server has answered for too long, or the pool is closed. Holds the lock."""
        if self._fatal is not None:
            raise self._fatal
        if self._is_closed:
            raise ApiError("rollouts: the run is over")
        silent = self._clock() - self._answered_at
        if silent > self._settings.patience and not any(member.works for member in self._members):
            reasons = "; ".join(f"{member.server.url} {member.reason}" for member in self._members)
            raise ApiError(
                f"rollouts: no server has answered for {silent:,.0f} s: {reasons}. Start one, and run again: it resumes from "
                "the last checkpoint with the completions that are there"
            )

    def _in_thread(self, call: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()

        def run() -> None:
            try:
                call()
            except BaseException as error:  # raised again where the result is read
                future.set_exception(error)
            else:
                future.set_result(None)

        threading.Thread(target=run, name="weights", daemon=True).start()
        return future

    def _connect(self, member: _Member, temperature: float, longest: int) -> None:
        server = member.server
        server.connect()
        if server.context_length is not None and server.context_length < longest:
            raise ConfigError(
                f"context_length: {longest:,} tokens, and {server.url} takes {server.context_length:,}; lower it, or start the "
                "server with a longer context"
            )
        if temperature != 1 and server.kind != "bessemer" and not server.scales_log_probs(self._tokenizer.bos_id, temperature):
            raise ConfigError(
                f"temperature: {server.url} gives log-probabilities of temperature 1, and rl needs those of {temperature:g}, "
                "from which tokens are drawn; start vLLM with --logprobs-mode processed_logprobs, or take temperature 1"
            )


def collect_served(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[ServedCompletion]]) -> Rollouts:
    """Completions of prompts, equally many of each, as an engine gives them."""
    rows = [(list(prompt), one) for prompt, of_prompt in zip(prompts, completions, strict=True) for one in of_prompt]
    prompt_lengths_R = torch.tensor([len(prompt) for prompt, _ in rows], dtype=torch.int64)
    lengths_R = torch.tensor([len(prompt) + len(one.token_ids) for prompt, one in rows], dtype=torch.int64)
    shape = (len(rows), int(lengths_R.max()) if rows else 0)
    tokens_RT = torch.zeros(shape, dtype=torch.int64)
    log_probs_RT, versions_RT = torch.zeros(shape), torch.zeros(shape, dtype=torch.int32)
    for place, (prompt, one) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(one.token_ids)
        tokens_RT[place, :end] = torch.tensor([*prompt, *one.token_ids])
        log_probs_RT[place, start:end] = torch.tensor(one.log_probs)
        versions_RT[place, start:end] = torch.tensor(one.versions, dtype=torch.int32)
    columns_T = torch.arange(shape[1])
    mask_RT = (columns_T >= prompt_lengths_R[:, None]) & (columns_T < lengths_R[:, None])
    reasons = tuple("length" if one.is_cut else "stop" for _, one in rows)
    texts = tuple(one.text for _, one in rows)
    return Rollouts(tokens_RT, mask_RT, log_probs_RT, versions_RT, prompt_lengths_R, lengths_R, reasons, texts)
