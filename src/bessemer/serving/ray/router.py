"""Chooses a replica for a request: one that has the beginning of its prompt in its cache, or the least busy one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

from bessemer.serving.ray.forwarding import Forwarded
from bessemer.serving.ray.prefixes import PrefixMemory

#: Share of a prompt that a replica must have seen to be chosen for it.
_MATCH_RATE = 0.25
#: How many requests more than the least busy one it may have then.
_IMBALANCE = 4
_PAUSE_SECONDS = 0.002


class PrefixRouter(FIFOMixin, RequestRouter):
    """Ray's request router for `EngineReplica.answer`.

    A replica goes to the request that it was chosen for, and to the oldest one where that has found another. Without the
    second half, that is without `FIFOMixin`, Ray 2.59 forgets a request whose routing task ends while others are routed.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Ray calls it in place of a constructor."""
        self._memory = PrefixMemory()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas; within one the least busy that accepts is taken."""
        if pending_request is None:
            # Ray has more tasks than requests for a moment: one that never pauses would keep all others from the event loop
            await asyncio.sleep(_PAUSE_SECONDS)
        else:
            # else Ray asks again and again without a pause while no replica has a place
            pending_request.routing_context.should_backoff = True
        prompt = _prompt(pending_request)
        matches = self._memory.matches(prompt, [_name(one.replica_id) for one in candidate_replicas]) if prompt else {}
        busy = {one.replica_id: self.replica_queue_len_cache.get(one.replica_id) or 0 for one in candidate_replicas}
        least = min(busy.values(), default=0)
        chosen = [
            one
            for one in candidate_replicas
            if matches.get(_name(one.replica_id), 0) >= max(_MATCH_RATE, max(matches.values(), default=0))
            and busy[one.replica_id] - least <= _IMBALANCE
        ]
        others = [one for one in candidate_replicas if one not in chosen]
        # Ray asks the replicas of a rank how busy they are: two at random keep that cheap
        pairs = random.sample(others, min(2, len(others)))
        return [rank for rank in (chosen, pairs) if rank]

    def _get_pending_request_matching_metadata(self, request_metadata: Any = None) -> PendingRequest | None:
        """Ray asks it first, for the request that a replica was chosen for."""
        found: PendingRequest | None = self._get_pending_request_matching_internal_request_id(request_metadata)
        return found

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        """A request has been sent to a replica."""
        if prompt := _prompt(pending_request):
            self._memory.remember(prompt, _name(replica_id))

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """The replicas that there are from now on."""
        super().update_replicas(replicas)
        self._memory.keep([_name(one.replica_id) for one in replicas])


def _prompt(pending: PendingRequest | None) -> str:
    asked: Sequence[object] = () if pending is None else pending.args
    return next((one.prompt for one in asked if isinstance(one, Forwarded)), "")


def _name(replica: ReplicaID) -> str:
    return str(replica.unique_id)
