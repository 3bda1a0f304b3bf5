import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import regex
import rustbpe
import tokenizers

from bessemer.core.errors import ConfigError
from bessemer.tokenization.bpe import encode_piece, merges_from_ranks, train_bpe
from bessemer.tokenization.byte_names import token_from_name
from bessemer.tokenization.split import SPLIT_REGEXES

MERGES = 250
QWEN2 = SPLIT_REGEXES["qwen2"]


@pytest.fixture(scope="module")
def tokens(corpus):
    return train_bpe(corpus, MERGES, QWEN2)


def hugging_face_merges(corpus, count):
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN2), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=256 + count,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(corpus, trainer)
    merges = json.loads(trained.to_str())["model"]["merges"]
    return [(token_from_name(left), token_from_name(right)) for left, right in merges]


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
    ours, theirs = merges_from_ranks(tokens), hugging_face_merges(corpus, MERGES)
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


def test_a_merge_worked_by_hand():
    # "ab" 4 times, "abc" 3 times of them: (a,b), then (ab,c)
    assert merges_from_ranks(train_bpe(["abc abc abc ab"], 2, r"\p{L}+|\s+")) == [(b"a", b"b"), (b"ab", b"c")]


def test_a_corpus_too_small_for_the_vocabulary_says_what_it_yields():
    with pytest.raises(ConfigError, match=r"1,000 merges are asked for and it yields 2; lower vocab_size by 998"):
        train_bpe(["abc"], 1000, QWEN2)


def test_a_million_spaces_are_trained_on():
    tokens = train_bpe([" " * 10**6 + "x", "abc"], 4, QWEN2)
    assert tokens[256:260] == [b"  ", b"    ", b" " * 8, b" " * 16]


def test_the_same_texts_give_the_same_tokens(corpus, tokens):
    assert train_bpe(iter(corpus), MERGES, QWEN2) == tokens
