from collections import Counter

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from bessemer.tokenization.algorithms import count_bert_words, train_wordpiece
from bessemer.tokenization.folder import write_folder
from bessemer.tokenization.tokenizer import load_tokenizer

SIZE = 600


@pytest.fixture(scope="module")
def wordpiece(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wordpiece")
    write_folder(folder, train_wordpiece(corpus, SIZE))
    return load_tokenizer(folder)


def test_words_are_berts():
    words = count_bert_words(["Größe, don't\t日本 a\x00b\x1cc \ufffdÉ\n" + "x" * 101, "don"])
    assert words == Counter({"don": 2} | dict.fromkeys(["Größe", ",", "'", "t", "日", "本", "abc", "É"], 1))


def test_the_vocabulary_is_that_of_the_plain_trainer_but_for_ties(corpus):
    ours = train_wordpiece(corpus, SIZE).model["vocab"]
    plain = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    texts = [" ".join(count_bert_words([text]).elements()) for text in corpus]
    plain.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=SIZE, special_tokens=["[UNK]"], show_progress=False))
    theirs = plain.get_vocab()
    assert {token for token in theirs if len(token.removeprefix("##")) == 1} <= ours.keys()
    assert len(ours.keys() & theirs.keys()) > 0.95 * SIZE


def test_a_word_is_spelt_by_its_longest_pieces_or_is_unknown(wordpiece):
    known = [wordpiece.token_bytes(id).decode().strip() for id in range(SIZE)]
    word = max((piece for piece in known if piece.isascii() and piece.isalpha()), key=len)
    assert len(wordpiece.encode(word, add_bos=False)) == 1
    text = f"  {word}{word[:1]}\n\n{word}"
    assert wordpiece.decode(wordpiece.encode(text, add_bos=False)) == f"{word}{word[:1]} {word}"
    assert wordpiece.encode("ω", add_bos=False) == wordpiece.encode("a" * 101, add_bos=False) == [0]


def test_case_and_accents_are_kept(wordpiece):
    assert wordpiece.decode(wordpiece.encode("Größe naïve café")) == "Größe naïve café"


def test_characters_take_at_most_half_of_the_vocabulary():
    rare = [chr(0x4E00 + index) for index in range(2000)]
    words = [left + right for left in "abcdefghij" for right in "klmnopqrst"] * 3
    vocab = train_wordpiece(["".join(rare), " ".join(words)], 90).model["vocab"]
    assert set("abcdefghijklmnopqrst") <= vocab.keys()
    assert sum(len(token.removeprefix("##")) == 1 for token in vocab) <= 46
    assert len(vocab) == 90
