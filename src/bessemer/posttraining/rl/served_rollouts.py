"""Rollouts that servers sample ahead of the training, by weights that are at most some versions older than those they train.

Groups of completions are numbered in the order of their prompts, and used in it, so that long completions are used as often as
short ones, and a run that is killed repeats none and loses none. With `max_staleness` s and G groups in a rollout, rollout r
lets the groups below its first one + (1 + s)·G begin: no group is used more than s rollouts after the one that let it begin.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bessemer.core.concurrency import DaemonThreads
from bessemer.core.hashing import hash_value
from bessemer.core.progress import Progress
from bessemer.posttraining.rl.group_journal import JOURNAL, GroupJournal, entry_of, judged_of
from bessemer.posttraining.rl.policy_sampler import JudgedGroup, PolicySampler
from bessemer.posttraining.rl.rollouts import Judged, RolloutSource, RolloutTally
from bessemer.posttraining.sampling.sampler import EncodedPrompt, SamplingEngine
from bessemer.posttraining.sampling.samples import Prompt, Share
from bessemer.training.data.batches import rows_at


class GroupCollector:
    """Groups under way and complete ones, by number.

    make: of a number, the judged group; several threads call it at once. recorded: entries of groups that are complete already.
    """

    def __init__(
        self, make: Callable[[int], Judged], threads: int, journal: GroupJournal, recorded: Mapping[int, Callable[[], Judged]]
    ) -> None:
        self._make = make
        self._journal = journal
        self._recorded = dict(recorded)
        self._threads = DaemonThreads(threads, "rollouts")
        self._calls: dict[int, Future[Judged]] = {}

    def begin(self, numbers: Sequence[int]) -> None:
        """Begin those of the groups that have not begun."""
        for number in numbers:
            if number not in self._calls:
                self._calls[number] = self._recalled(number) or self._threads.submit(partial(self._made, number))

    def take(self, number: int) -> Judged:
        """Wait for a group that has begun, and return it. Raises the error that sampling or judging it raised."""
        judged = self._calls[number].result()
        del self._calls[number]
        return judged

    @property
    def under_way(self) -> int:
        """Groups that have begun and are not complete."""
        return sum(not call.done() for call in self._calls.values())

    def close(self) -> None:
        """Begin no more."""
        self._threads.close()

    def _recalled(self, number: int) -> Future[Judged] | None:
        read = self._recorded.pop(number, None)
        if read is None:
            return None
        future: Future[Judged] = Future()
        future.set_result(read())
        return future

    def _made(self, number: int) -> Judged:
        judged = self._make(number)
        self._journal.add(number, entry_of(judged))
        return judged


class ServedRolloutSource(RolloutSource):
    """Batches of completions that servers make while the policy trains. Of several processes the first asks the servers."""

    def __init__(
        self,
        sampler: PolicySampler,
        prompts: Sequence[Prompt],
        out: Path,
        progress: Progress,
        held_out: Sequence[Prompt] = (),
    ) -> None:
        """As `RolloutSource`; the sampler has servers."""
        super().__init__(sampler, prompts, out, progress, held_out)
        config = sampler.config
        assert config.rollouts is not None and sampler.servers is not None
        self._staleness = config.rollouts.max_staleness
        self._servers = sampler.servers
        fingerprint = hash_value([self.fingerprint, config.output_settings()])
        self._journal = GroupJournal(out / JOURNAL, fingerprint, config.groups)
        self._judging = threading.Lock()
        self._collector: GroupCollector | None = None

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self._sampler.models.mesh.leads:
            self._journal.checkpoint(self._cursor)
        return state

    def close(self) -> None:
        if self._collector is not None:
            self._collector.close()
        self._servers.close()
        super().close()

    def finish(self) -> None:
        """Remove the journal: the run is over."""
        if self._sampler.models.mesh.leads:
            self._journal.remove()

    # -- one rollout

    def _sampled_groups(self, engine: SamplingEngine, step: int, tally: RolloutTally) -> list[JudgedGroup]:
        groups = super()._sampled_groups(engine, step, tally)
        self._metrics |= self._staleness_of(groups, step)
        return groups

    def _next_judged(self, engine: SamplingEngine, count: int, step: int, refill: int) -> list[Judged]:
        judged = self._share().gathered(partial(self._taken, engine, count, self._ahead(step)))
        self._cursor += count
        return judged

    def _share(self) -> Share:
        return Share(self._sampler.models.mesh, of_first=True)

    def _ahead(self, step: int) -> int:
        """Groups of later rollouts that may begin now."""
        config = self._config
        assert config.steps is not None
        rollouts = -(-config.steps // config.updates)
        return min(self._staleness, rollouts - 1 - step // config.updates) * config.groups

    def _taken(self, engine: SamplingEngine, count: int, ahead: int) -> list[Judged]:
        """The next `count` groups, with `ahead` more under way."""
        collector = self._open_collector(engine)
        collector.begin(range(self._cursor, self._cursor + count + ahead))
        return [collector.take(number) for number in range(self._cursor, self._cursor + count)]

    def _open_collector(self, engine: SamplingEngine) -> GroupCollector:
        if self._collector is None:
            recorded = {
                number: partial(judged_of, entry, self._prompt_of(number)[0])
                for number, entry in self._journal.read(self._cursor).items()
            }
            if recorded:
                self._progress.say(f"  {len(recorded):,} groups of completions are there from before")
            threads = min(self._servers.pool.concurrency, (1 + self._staleness) * self._config.groups)
            self._collector = GroupCollector(partial(self._made, engine), threads, self._journal, recorded)
        return self._collector

    def _made(self, engine: SamplingEngine, number: int) -> Judged:
        """Sample and judge a group. Called in threads; rewards judge one group at a time, as they may be anybody's code."""
        config = self._config
        step = number // config.groups * config.updates
        place = number % config.groups
        seeds = ("rollout", step, 0)
        samples = self._sampler.completions(engine, [self._prompt_of(number)], config.group_size, seeds=seeds, places=[place])
        with self._judging:
            judgement = self._sampler.judged(samples, step)
        return self._grouped(samples, judgement, config.group_size)[0]

    def _prompt_of(self, number: int) -> EncodedPrompt:
        (place,) = rows_at(np.array([number]), len(self._prompts), self._seed)
        return self._prompts[place]

    def _staleness_of(self, groups: Sequence[JudgedGroup], step: int) -> dict[str, float]:
        """By how many versions the tokens are older than the weights that they train: mean and maximum."""
        versions = [version for group in groups for sample in group.samples for version in sample.versions or ()]
        if not versions:
            return {}
        ages = (step - np.array(versions)) / self._config.updates
        return {"staleness": float(ages.mean()), "staleness_max": float(np.ceil(ages.max()))}
