import io
import random
import re
from collections import Counter

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.tokenization import sentencepieces
from bessemer.tokenization.folder import write_folder
from bessemer.tokenization.formats.sentencepiece_file import write_sentencepiece
from bessemer.tokenization.sentencepieces import WORD, count_sentencepiece_words, train_sentencepiece_bpe, train_unigram
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.tokenization.vocabulary import SPACE_MARK
from tests.cases import slow

TRAINERS = {"unigram": (train_unigram, 470), "sentencepiece_bpe": (train_sentencepiece_bpe, 700)}

#: Text that is nearly the name of a byte, of a control token or of the unknown, and text with many segmentations.
FRAGMENTS = [*("<0x41>", "<0x", "0A>", "41>", "<", ">", "<unk>", "<|endoftext|>", "<|im_end|>", " ", "  ", "\n", "\t", "_")]
FRAGMENTS += [*"aeinorst=-x05é日\u0301\u2585\0", "ing", "tion", "ba" * 5, "a" * 40, " " * 40, "=" * 40, "\n\n\n"]


@pytest.fixture(scope="module", params=sorted(TRAINERS))
def pair(request, corpus, tmp_path_factory):
    """A tokenizer, and the sentencepiece library on what it was exported to."""
    train, size = TRAINERS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    write_folder(folder, train(corpus, size))
    write_sentencepiece(folder, folder / "tokenizer.model")
    return load_tokenizer(folder), sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def test_ids_equal_sentencepieces(pair, corpus, hostile_texts):
    ours, library = pair
    texts = [*corpus, *hostile_texts[:4000]]
    differing = [text for text in texts if ours.encode(text, add_bos=False) != library.encode(text)]
    assert differing == []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=14).map("".join))
def test_ids_equal_sentencepieces_on_anything_typed_and_decode_to_it(pair, text):
    ours, library = pair
    ids = ours.encode(text, add_bos=False)
    assert ids == library.encode(text)
    assert ours.decode(ids) == text.replace(SPACE_MARK, " ")


def test_equal_scores_are_decided_alike(pair):
    """Sums in float32 and in float64 differ by their rounding, but not on a grid; long documents too."""
    ours, library = pair
    draw = random.Random(11)
    pieces = [library.id_to_piece(id).replace(SPACE_MARK, " ") for id in range(257, library.vocab_size() - 3)]
    for length in (30, 300, 3000):
        for _ in range(60_000 // length // 20):
            text = "".join(draw.choices(pieces, k=length))
            assert ours.encode(text, add_bos=False) == library.encode(text)


def test_scores_are_multiples_of_one_64th(corpus):
    scores = [score for _, score in train_unigram(corpus, 470).model["vocab"]]
    assert all(score * 64 == int(score * 64) for score in scores)


def test_line_feed_tab_and_ascii_are_tokens_whatever_the_corpus(pair):
    ours, _ = pair
    assert all(len(ours.encode(chr(code), add_bos=False)) == 1 for code in [9, 10, *range(0x20, 0x7F)])


def test_what_the_library_would_drop_is_learnt():
    """A sentence with U+2585, tabs, line ends in a row, NUL or a lone surrogate beside a word, a private character."""
    texts = ["\tzip\r\n", "\u2585\u2585zip\n\n\n", "zip\0zip zip", "\ue000zip", "zip zip", "a\ud800zip"] * 9
    parts = train_sentencepiece_bpe(texts, 257 + 100 + 6)
    learnt = set(parts.model["vocab"])
    assert {"zip", "\u2585\u2585", "\n\n", "\r\n", "\ue000"} <= learnt
    assert "\0" not in learnt


def test_digits_stand_alone_and_spaces_in_runs_of_their_own(pair):
    _, library = pair
    pieces = [library.id_to_piece(id) for id in range(257, library.vocab_size() - 3)]
    assert [piece for piece in pieces if re.search(r"\d", piece) and len(piece) > 1] == []
    assert [piece for piece in pieces if SPACE_MARK in piece[1:] and set(piece) != {SPACE_MARK}] == []
    assert [piece for piece in pieces if len(re.findall(WORD, piece)) > 1] == []


def test_a_word_that_begins_no_other_is_a_piece():
    """The trainer takes a string where its occurrences go on differently; a word by itself always goes on alike."""
    draw = random.Random(2)
    words = ["zebra", "quince", "violet", "walrus", "mango", "harbour"]
    counts = count_sentencepiece_words([" ".join(draw.choices(words, k=4000))], 256)
    assert {f"{SPACE_MARK}{word}" for word in words} <= counts.keys()
    pieces = dict(train_unigram([" ".join(draw.choices(words, k=4000))], 257 + 97 + 6).model["vocab"])
    assert {f"{SPACE_MARK}{word}" for word in words} <= pieces.keys()


def test_the_sentences_for_the_library_hold_every_word_as_often_as_counted(corpus):
    counts = count_sentencepiece_words(corpus, 256)
    again = Counter()
    for text, count in sentencepieces._sentences(counts):
        again.update({word: count * times for word, times in Counter(re.findall(WORD, text)).items()})
    assert again == counts


def test_words_are_cut_at_the_given_length_and_lose_nothing_else():
    counts = count_sentencepiece_words(["a" * 25 + " " * 25 + "b12é) \n", "x\0y\ud800z"], 10)
    assert counts == Counter(
        {"a" * 10: 2, "a" * 5: 1, SPACE_MARK * 10: 2, SPACE_MARK * 5 + "b": 1}
        | dict.fromkeys(["1", "2", "é", ")", SPACE_MARK + "\n", "x", "y", "z"], 1)
    )


def test_bpe_learns_what_the_library_learns_from_the_text_itself(corpus):
    """The same pieces; of equally frequent pairs another may be the first."""
    stand_in = str.maketrans("\n\t", "\ue000\ue001")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text.translate(stand_in) for text in corpus),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        byte_fallback=True,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        required_chars="\ue000\ue001" + "".join(map(chr, range(0x21, 0x7F))),
        bos_id=-1,
        eos_id=-1,
        max_sentence_length=1 << 20,
        minloglevel=2,
    )
    library = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    theirs = [library.id_to_piece(id).translate({0xE000: "\n", 0xE001: "\t"}) for id in range(700)]
    ours = list(train_sentencepiece_bpe(corpus, 700).model["vocab"])
    assert len(set(ours) & set(theirs)) >= 697
    assert ours[:350] == theirs[:350]


def test_a_large_corpus_is_scaled_down_and_rare_words_are_drawn():
    counts = Counter({f"w{index}": 1 for index in range(10_000)} | {"the": 40_000})
    total = sum(len(word) * count for word, count in counts.items())
    scaled = sentencepieces._scaled(counts, total // 10)
    assert scaled["the"] in (4000, 4001)
    assert 800 < len(scaled) < 1200
    assert scaled == sentencepieces._scaled(counts, total // 10)
    assert sentencepieces._scaled(counts, total) == counts


@pytest.mark.parametrize("character", [" ", *map(slow, "a=\n日")])
def test_a_long_run_of_one_character_is_encoded_in_a_moment(pair, character):
    """Minutes when a run of spaces is searched from each of them."""
    ours, library = pair
    text = character * 300_000
    assert ours.encode(text, add_bos=False) == library.encode(text)
