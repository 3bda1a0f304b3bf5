"""The store of responses: bounded by number and bytes, and nobody's flood drops what others have."""

from __future__ import annotations

import asyncio

from bessemer.serving.responses.store import MemoryStore, StoredResponse


def response(owner: str, size: int = 10) -> StoredResponse:
    return StoredResponse(owner, {"id": owner}, [{"role": "user", "content": "x" * size}], [])


def kept(store: MemoryStore, *given: tuple[str, StoredResponse]) -> set[str]:
    """Which of the given responses are there once all were kept."""

    async def run() -> set[str]:
        for identity, one in given:
            await store.keep(identity, one)
        return {identity for identity, _ in given if await store.find(identity) is not None}

    return asyncio.run(run())


def test_a_flood_of_one_key_leaves_the_responses_of_another():
    flood = [(f"flood {place}", response("ann")) for place in range(50)]
    left = kept(MemoryStore(most=10), ("first", response("bob")), *flood, ("last", response("bob")))
    assert left == {"first", "last", *(f"flood {place}" for place in range(42, 50))}


def test_large_responses_are_few():
    large = [(f"large {place}", response("ann", 2**20)) for place in range(8)]
    left = kept(MemoryStore(most_mib=4), ("small", response("bob")), *large)
    assert left == {"small", "large 5", "large 6", "large 7"}


def test_one_that_is_larger_than_the_store_is_not_kept():
    assert kept(MemoryStore(most_mib=1), ("huge", response("ann", 2**21)), ("small", response("ann"))) == {"small"}


def test_a_response_that_is_kept_again_or_dropped_counts_once_and_no_longer():
    store = MemoryStore(most=2)
    assert kept(store, ("a", response("ann")), ("a", response("ann")), ("b", response("ann"))) == {"a", "b"}
    asyncio.run(store.drop("a"))
    assert kept(store, ("b", response("ann")), ("c", response("ann"))) == {"b", "c"}
    asyncio.run(store.drop("nothing"))
