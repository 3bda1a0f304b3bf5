import pytest

from bessemer.inference.scheduling.block_tables import BlockGroup, BlockPool, BlockTables, chain_hash, root_hash
from bessemer.inference.scheduling.sequence import ImageMark, TokenSequence


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


def test_the_chain_of_a_text_with_pictures_differs_from_the_block_on_that_shows_another():
    def chain_of(*marks):
        sequence = TokenSequence(0, list(range(20)), 20, 100, images=list(marks))
        return tables_of(8).extend_chain(sequence, 5)

    plain, one, other = chain_of(), chain_of(ImageMark(9, 15, b"one")), chain_of(ImageMark(9, 15, b"another"))
    # blocks of four tokens, the root first: the picture lies in the third and the fourth, and what follows knows of it
    assert plain[:3] == one[:3] == other[:3]
    assert all(len({*hashes}) == 3 for hashes in zip(plain[3:], one[3:], other[3:], strict=True))
    after_it = chain_of(ImageMark(16, 17, b"one"))
    assert after_it[:5] == plain[:5] and after_it[5] != plain[5]
    assert chain_of(ImageMark(10, 15, b"one"))[3] != one[3]


def tables_of(*blocks, windows=(None,), size=4):
    groups = [BlockGroup(BlockPool(count, size), window) for count, window in zip(blocks, windows, strict=True)]
    return BlockTables(groups, block_size=size, align=1, share_generated=True, share_prefixes=True)


def begun(tables, length, computed=0, limit=100, hit=0):
    """A sequence of numbers from 0, whose first tokens are computed."""
    sequence = TokenSequence(0, list(range(length)), length, limit)
    if hit:
        assert tables.match(sequence) >= hit
    tables.begin(sequence, hit)
    if computed:
        tables.take(sequence, computed, [])
        sequence.computed = computed
        tables.advance(sequence)
    return sequence


@pytest.mark.parametrize("size", [1, 3, 4])
def test_the_most_blocks_at_once_are_those_of_the_window_and_a_chunk_wherever_they_begin(size):
    tables = tables_of(1, size=size)
    for window in (1, 2, 5, 8):
        for chunk in (1, 2, 7):
            spans = [{(first + index) // size for index in range(window - 1 + chunk)} for first in range(size)]
            assert tables.most(1000, chunk, window) == max(map(len, spans))
            assert tables.most(size, chunk, window) == 1 and tables.most(size + 1, 9, 9) == 2
        for position in range(30):
            seen = range(max(0, position - window + 1), position + 1)
            assert tables.passed(position, window) == seen[0] // size
    assert [tables.most(tokens, 1, None) for tokens in (0, 1, size, size + 1)] == [0, 1, 1, 2]
    assert tables.passed(30, None) == 0


def test_what_a_running_sequence_lacks_is_what_it_takes_at_most_at_once():
    tables = tables_of(20, 20, windows=(None, 5))
    sequence = begun(tables, 41, computed=10)
    # of 11 blocks it has 3; its window of 5 and chunks of 6 span 4 at most, of which it has 2
    assert [len(table) for table in sequence.tables] == [3, 3] and sequence.passed == [0, 1]
    assert tables.outstanding(sequence, 6) == [8, 2]
    assert tables.outstanding(sequence, 100) == [8, 8]


def test_a_sequence_fits_to_the_last_block_beside_what_is_kept_back():
    tables = tables_of(8, 6, windows=(None, 5))
    first = begun(tables, 20, computed=20)
    tables.release(first)
    assert [pool.cached for pool, _ in tables.groups] == [5, 5]
    again = TokenSequence(0, [*range(16), 50, 51], 18, 100)
    hit = tables.match(again)
    # 5 blocks, of which 4 are found idle; the window needs the last of them
    assert hit == 4
    assert (
        tables.fits(again, hit, 1, [3, 4]) and not tables.fits(again, hit, 1, [4, 4]) and not tables.fits(again, hit, 1, [3, 5])
    )
    held = begun(tables, 18, hit=4)
    assert [pool.free for pool, _ in tables.groups] == [4, 5]
    # what others hold takes nothing that is free
    assert (
        tables.fits(again, hit, 1, [3, 4]) and not tables.fits(again, hit, 1, [4, 4]) and not tables.fits(again, hit, 1, [3, 5])
    )
    tables.release(held)
    other = TokenSequence(0, [*range(90, 108)], 18, 100)
    assert tables.match(other) == 0
    assert tables.fits(other, 0, 4, [3, 3]) and not tables.fits(other, 0, 4, [4, 3]) and not tables.fits(other, 0, 4, [3, 4])


def test_a_sequence_reaches_to_the_end_of_the_last_free_block_and_a_copy_takes_one():
    tables = tables_of(4)
    sequence = begun(tables, 30, computed=6)
    assert tables.reach(sequence) == 16
    tables.groups[0].pool.share(sequence.tables[0][1])
    assert tables.reach(sequence) == 12
    sequence.tokens, sequence.draft = sequence.tokens[:7], [1, 2]
    assert tables.reach(sequence) == 9
    copies = []
    shared = sequence.tables[0][1]
    tables.take(sequence, 9, copies)
    assert copies == [(0, shared, sequence.tables[0][1])] and sequence.reserved == 12 and len(sequence.tables[0]) == 3
    tables.trim(sequence, 8)
    assert sequence.reserved == 8 and len(sequence.tables[0]) == 2


def test_full_blocks_are_sealed_as_soon_as_they_are_computed():
    tables = tables_of(8)
    pool = tables.groups[0].pool
    sequence = begun(tables, 12, computed=3)
    sealed = []
    for computed in (4, 7, 8):
        tables.take(sequence, computed, [])
        sequence.computed = computed
        tables.advance(sequence)
        sealed.append([pool.is_sealed(block) for block in sequence.tables[0]])
    assert sealed == [[True], [True, False], [True, True]]


def test_a_child_shares_what_its_parent_holds_within_its_window():
    tables = tables_of(8, 8, windows=(None, 5))
    parent = begun(tables, 20, computed=14)
    child = TokenSequence(1, list(range(20)), 20, 100)
    # a window before 8 is gone
    assert parent.passed == [0, 2] and not tables.branch(parent, child, 11) and child.tables == []
    assert tables.branch(parent, child, 13)
    assert [table[:2] for table in child.tables] == [parent.tables[0][:2], [-1, -1]]
    assert (child.computed, child.sealed, child.reserved, parent.reserved, child.passed) == (13, 3, 0, 13, [0, 2])
    assert [len(table) for table in child.tables] == [4, 4] and child.chain == parent.chain[:4]


@pytest.mark.parametrize("last", [6, 7])
def test_as_many_blocks_as_the_window_sees_are_enough_to_be_found(last):
    tables = tables_of(20, 20, windows=(None, 5))
    sequence = TokenSequence(0, list(range(30)), 30, 100)
    chain = tables.extend_chain(sequence, 7)
    for key in chain[1:]:
        tables.groups[0].pool.seal(tables.groups[0].pool.allocate(), key)
    tables.groups[1].pool.seal(tables.groups[1].pool.allocate(), chain[last])
    assert tables.match(sequence) == last
