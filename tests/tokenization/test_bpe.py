from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import regex
import rustbpe
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.core.errors import ConfigError
from bessemer.tokenization import bpe
from bessemer.tokenization.bpe import _may_have_run, cut_runs, cut_texts, encode_piece, merges_from_ranks, train_bpe
from bessemer.tokenization.split import SPLIT_REGEXES

MERGES = 250
TRAINERS = ["rustbpe", "tokenizers"]
QWEN2 = SPLIT_REGEXES["qwen2"]


@pytest.fixture(scope="module")
def tokens(corpus):
    return train_bpe(corpus, MERGES, QWEN2)


def replay(corpus, merges):
    """Count all pairs anew before every merge, the definition of BPE; how often a merge's pair was beaten or tied."""
    pieces = Counter(piece.encode() for text in corpus for piece in regex.findall(QWEN2, text))
    words = {piece: [piece[i : i + 1] for i in range(len(piece))] for piece in pieces}
    beaten = tied = 0
    for left, right in merges:
        counts = Counter()
        for piece, parts in words.items():
            for pair in pairwise(parts):
                counts[pair] += pieces[piece]
        most = max(counts.values())
        beaten += counts[left, right] < most
        tied += sum(count == most for count in counts.values()) > 1
        for parts in words.values():
            index = 0
            while index < len(parts) - 1:
                if (parts[index], parts[index + 1]) == (left, right):
                    parts[index : index + 2] = [left + right]
                index += 1
    return beaten, tied


def test_every_merge_is_of_the_most_frequent_pair_at_its_time(corpus, tokens):
    beaten, _ = replay(corpus, merges_from_ranks(tokens))
    assert beaten == 0


def test_hugging_faces_trainer_makes_the_same_merges_but_for_ties(corpus, tokens):
    ours, theirs = merges_from_ranks(tokens), merges_from_ranks(train_bpe(corpus, MERGES, QWEN2, trainer="tokenizers"))
    beaten, tied = replay(corpus, theirs)
    assert (beaten, len(theirs)) == (0, MERGES)
    differing = len(set(ours) - set(theirs))
    assert 0 < differing < tied  # each was a choice between equals
    first = next(index for index in range(MERGES) if ours[index] != theirs[index])
    assert replay(corpus, ours[: first + 1])[1] == replay(corpus, ours[:first])[1] + 1  # the first is a tie
    assert first > 20


def test_the_rebuilt_merges_encode_as_the_trainer_does(corpus, tokens):
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(corpus), 256 + MERGES, 8192, QWEN2)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for text in corpus[:20]:
        pieces = [piece.encode() for piece in regex.findall(QWEN2, text)]
        assert [ranks[part] for piece in pieces for part in encode_piece(piece, ranks, len(ranks))] == trainer.encode(text)


def test_the_saved_tokenizer_encodes_the_corpus_as_the_trainer_does(corpus, tokenizer):
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(corpus), tokenizer.vocab_size - 3, 8192, QWEN2)
    ids, _ = tokenizer.encode_flat(corpus)
    assert np.array_equal(ids, [id for text in trainer.batch_encode(corpus) for id in text])


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_merge_worked_by_hand(trainer):
    # "ab" 4 times, "abc" 3 times of them: (a,b), then (ab,c)
    tokens = train_bpe(["abc abc abc ab"], 2, r"\p{L}+|\s+", trainer=trainer)
    assert tokens[:256] == [bytes([byte]) for byte in range(256)]
    assert merges_from_ranks(tokens) == [(b"a", b"b"), (b"ab", b"c")]


@pytest.mark.parametrize("split", SPLIT_REGEXES)
def test_the_trainer_cuts_by_the_regex_as_it_is_written(corpus, split):
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(corpus), 256 + MERGES, 8192, SPLIT_REGEXES[split])
    assert train_bpe(corpus, MERGES, SPLIT_REGEXES[split]) == [token for token, _ in trainer.get_mergeable_ranks()]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_corpus_too_small_for_the_vocabulary_says_what_it_yields(trainer):
    with pytest.raises(ConfigError, match=r"1,000 merges are asked for and it yields 2; lower vocab_size by 998"):
        train_bpe(["abc"], 1000, QWEN2, trainer=trainer)


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("character", ["a", " ", "1", "-", "\n", "日", "👍"])
def test_a_million_of_one_character_make_tokens_no_longer_than_the_cap(trainer, character):
    tokens = train_bpe([character * 10**6 + "x", "abc"], 4, SPLIT_REGEXES["gpt-2"], trainer=trainer)
    assert max(len(token.decode(errors="ignore")) for token in tokens) <= 256


@given(st.text(" \n\ta.\x1c\u3000\u0301", max_size=60), st.integers(1, 9))
@settings(deadline=None)
def test_a_run_is_cut_after_so_many_characters_and_only_there(text, longest):
    cut = list(cut_runs([text], longest))
    assert "".join(cut) == text
    runs = [run for part in cut for run in regex.findall(r"\s+|\S+", part)]
    assert all(len(run) <= longest for run in runs)
    assert len(cut) == 1 + sum((len(run) - 1) // longest for run in regex.findall(r"\s+|\S+", text))


@pytest.mark.parametrize("split", SPLIT_REGEXES)
@given(text=st.text(" \n\ta.'s1\x1c\u3000\u0301", max_size=60))
@settings(deadline=None)
def test_no_piece_of_training_is_longer_than_the_cap_allows(split, text):
    for piece in (piece for part in cut_runs([text], 4) for piece in regex.findall(SPLIT_REGEXES[split], part)):
        assert len(piece) <= 5 or ("\n" in piece and len(piece) <= 9 and not regex.search(r"[\p{L}\p{N}]", piece))


words = st.text("a.'s1\u0301", min_size=1, max_size=4)
gaps = st.sampled_from(["  ", "\n ", " \n", "\u3000 ", " "])


@given(
    st.lists(st.builds("{} {}{}".format, words, words, gaps), max_size=8).map("".join), st.sampled_from(sorted(SPLIT_REGEXES))
)
def test_a_long_text_is_cut_where_the_regex_cuts_too(text, split):
    pieces = [piece for part in cut_texts([text], 20) for piece in regex.findall(SPLIT_REGEXES[split], part)]
    assert pieces == regex.findall(SPLIT_REGEXES[split], text)


def test_a_run_is_looked_for_where_half_of_its_length_has_no_space_and_in_no_text_of_short_words():
    words = "some words and more of them, all short"
    assert not any(_may_have_run(words[:length], 16) for length in range(len(words) + 1))
    assert all(_may_have_run(f"{words[:before]} {'x' * 16} {words}", 16) for before in range(len(words)))


def test_long_texts_are_cut_to_the_length_and_whole_again():
    texts = ["word " * 10, " " * 33, "x" * 25, "", "ab   cd   ef   gh"]
    cut = list(cut_texts(texts, 8))
    assert "".join(cut) == "".join(texts)
    assert max(map(len, cut)) == 8
    assert cut[:2] == ["word", " word"]
    assert list(cut_texts(["a word-without-an-end"], 8)) == ["a", " word-wi", "thout-an", "-end"]


def test_training_holds_one_batch_of_texts_and_not_the_corpus(monkeypatch):
    alive = set()

    class Text(str):
        def __init__(self, _):
            alive.add(id(self))
            most[0] = max(most[0], len(alive))

        def __del__(self):
            alive.discard(id(self))

    most = [0]
    monkeypatch.setattr(bpe, "_TEXTS_PER_BATCH", 50)
    train_bpe((Text(f"low lower {number}") for number in range(1000)), 3, QWEN2)
    assert most[0] <= 100


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_same_texts_give_the_same_tokens(corpus, trainer):
    assert train_bpe(iter(corpus), MERGES, QWEN2, trainer=trainer) == train_bpe(corpus, MERGES, QWEN2, trainer=trainer)


def test_a_regex_is_grouped_before_its_lookahead_where_it_is_one_of_ours():
    assert bpe.without_lookahead_first(r"a|\s+(?!\S)|\s+") == r"a|\s+(?!\S)|\s+"
    before, after = SPLIT_REGEXES["gpt-2"].split(r"|\s+(?!")
    assert bpe.without_lookahead_first(SPLIT_REGEXES["gpt-2"]) == rf"(?:{before})|\s+(?!{after}"
