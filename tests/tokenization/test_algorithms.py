import hashlib
import json
import os
import re
import subprocess
import sys

import pytest

from bessemer.core.errors import ConfigError
from bessemer.tokenization.config import TokenizeConfig
from bessemer.tokenization.folder import write_folder
from bessemer.tokenization.tokenizer import load_tokenizer
from tests.tokenization.conftest import ALGORITHMS, synthetic_corpus, train

SIZES = {"unigram": 480, "word": 300}


def config(algorithm, size=None):
    return TokenizeConfig(algorithm=algorithm, vocab_size=size or SIZES.get(algorithm, 600), chat_template="plain")


def parts_hash(algorithm):
    parts = train(config(algorithm), iter(synthetic_corpus()))
    return hashlib.sha256(json.dumps([parts.size, parts.model]).encode()).hexdigest()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_vocabulary_has_the_size_asked_for_and_no_gaps(algorithm, corpus):
    parts = train(config(algorithm), iter(corpus))
    vocab = parts.model["vocab"]
    ids = range(len(vocab)) if isinstance(vocab, list) else sorted(vocab.values())
    assert list(ids) == list(range(parts.size))
    smaller = {"byte": 256, "character": 256 + len(set("".join(corpus)))}
    assert parts.size == smaller.get(algorithm, config(algorithm).learned_tokens)
    assert "<|endoftext|>" not in json.dumps(vocab)


def test_the_same_texts_give_the_same_tokenizer_on_another_machine():
    """A process of its own, with other hashes of strings and a single core."""
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from tests.tokenization.test_algorithms import ALGORITHMS, parts_hash\n"
        "print(*map(parts_hash, ALGORITHMS))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.split() == [parts_hash(algorithm) for algorithm in ALGORITHMS]


@pytest.mark.parametrize("algorithm", ["bpe", "unigram", "sentencepiece_bpe", "wordpiece"])
def test_too_few_texts_are_refused_with_a_size_that_works(algorithm):
    texts = synthetic_corpus(4)
    with pytest.raises(ConfigError, match="too small for this vocabulary") as refused:
        train(config(algorithm, 5000), texts)
    less = int(re.search(r"lower vocab_size by ([\d,]+)", str(refused.value))[1].replace(",", ""))
    assert train(config(algorithm, 5000 - less), texts).size == 5000 - less - 1


@pytest.mark.parametrize("algorithm", ["unigram", "sentencepiece_bpe"])
def test_a_vocabulary_without_room_for_the_characters_is_refused_with_one_that_has(algorithm, corpus):
    with pytest.raises(ConfigError, match="characters of the corpus alone") as refused:
        train(config(algorithm, 300), corpus)
    more = int(re.search(r"raise vocab_size by ([\d,]+)", str(refused.value))[1])
    assert train(config(algorithm, 300 + more), corpus).size == 299 + more


@pytest.mark.parametrize("algorithm", ["unigram", "sentencepiece_bpe"])
def test_texts_without_anything_to_learn_are_refused(algorithm):
    with pytest.raises(ConfigError, match="nothing to learn"):
        train(config(algorithm), ["", "\0"])


def test_words_are_the_most_frequent_and_others_are_unknown(tmp_path):
    parts = train(config("word", 260), ["b a  b\nc", "a b <unk>"])
    assert list(parts.model["vocab"]) == ["<unk>", "b", "a", "c"]
    write_folder(tmp_path, parts, "plain")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(" c\tzebra b", add_bos=False) == [3, 0, 1]
    assert tokenizer.decode([3, 1, 2]) == "c b a"


def test_characters_are_single_tokens_and_others_are_bytes(tmp_path):
    parts = train(config("character", 258), ["aab"])
    write_folder(tmp_path, parts, "plain")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("abé<0x41>", add_bos=False) == [256, ord("b"), 0xC3, 0xA9, *b"<0x41>"]
