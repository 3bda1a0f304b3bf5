import pytest

from bessemer.inference.scheduling.block_tables import BlockPool, chain_hash, root_hash


def test_a_released_block_without_a_seal_is_blank():
    pool = BlockPool(2, 4)
    block = pool.allocate()
    assert (pool.free, pool.cached) == (1, 0)
    pool.release(block)
    assert (pool.free, pool.cached) == (2, 0)


def test_a_sealed_block_is_found_after_it_is_released_and_until_it_is_given_out():
    pool = BlockPool(1, 4)
    block = pool.allocate()
    pool.seal(block, b"text")
    pool.release(block)
    assert pool.find(b"text") == block
    assert pool.cached == pool.free == 1
    pool.allocate()
    assert pool.find(b"text") is None
    assert pool.evictions == 1


def test_blank_blocks_are_given_out_before_cached_ones_and_those_in_order_of_release():
    pool = BlockPool(3, 4)
    first, second, blank = (pool.allocate() for _ in range(3))
    pool.seal(first, b"first")
    pool.seal(second, b"second")
    for block in (second, blank, first):
        pool.release(block)
    assert [pool.allocate() for _ in range(3)] == [blank, second, first]


def test_a_shared_block_is_used_anew():
    pool = BlockPool(2, 4)
    blocks = [pool.allocate(), pool.allocate()]
    for block in blocks:
        pool.seal(block, bytes([block]))
        pool.release(block)
    pool.share(blocks[0])
    pool.release(blocks[0])
    assert pool.allocate() == blocks[1]


def test_a_block_held_twice_is_free_after_two_releases():
    pool = BlockPool(1, 4)
    block = pool.allocate()
    pool.share(block)
    pool.release(block)
    assert pool.free == 0
    pool.release(block)
    assert pool.free == 1


def test_releasing_a_free_block_is_our_own_error():
    pool = BlockPool(1, 4)
    pool.release(block := pool.allocate())
    with pytest.raises(AssertionError, match="twice"):
        pool.release(block)


def test_who_writes_to_a_shared_block_owns_another():
    pool = BlockPool(2, 4)
    block = pool.allocate()
    pool.share(block)
    fresh = pool.own(block)
    assert fresh != block
    assert pool.references[block] == pool.references[fresh] == 1


def test_who_writes_to_a_block_of_its_own_keeps_it_and_it_is_found_no_more():
    pool = BlockPool(2, 4)
    block = pool.allocate()
    pool.seal(block, b"text")
    assert pool.own(block) == block
    assert pool.find(b"text") is None


def test_the_first_block_sealed_under_a_text_stays_the_one_found():
    pool = BlockPool(2, 4)
    first, second = pool.allocate(), pool.allocate()
    pool.seal(first, b"text")
    pool.seal(second, b"text")
    assert pool.find(b"text") == first
    assert not pool.is_sealed(second)


def test_what_is_forgotten_is_blank():
    pool = BlockPool(2, 4)
    idle, held = pool.allocate(), pool.allocate()
    pool.seal(idle, b"idle")
    pool.release(idle)
    pool.forget()
    assert pool.find(b"idle") is None
    assert (pool.free, pool.cached) == (1, 0)
    assert pool.allocate() != held


def test_a_hash_tells_apart_tokens_their_order_their_past_their_adapter_and_the_weights():
    root = root_hash(None)
    hashes = [
        root,
        root_hash("None"),
        root_hash("1"),
        root_hash(None, 1),
        chain_hash(root, [1, 2]),
        chain_hash(root, [2, 1]),
        chain_hash(root, [1, 2, 0]),
        chain_hash(chain_hash(root, [1]), [2]),
        chain_hash(root_hash("1"), [1, 2]),
    ]
    assert len(set(hashes)) == len(hashes)
    assert chain_hash(root_hash(None), [1, 2]) == hashes[4]
