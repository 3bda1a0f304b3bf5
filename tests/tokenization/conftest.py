import os
import random

import pyarrow as pa
import pytest

from bessemer.core.hashing import hash_bytes
from bessemer.data.corpus.reader import SCHEMA
from bessemer.data.corpus.writer import write_documents
from bessemer.tokenization.algorithms import train_vocabulary
from bessemer.tokenization.bpe import byte_level_bpe, train_bpe
from bessemer.tokenization.config import TokenizeConfig
from bessemer.tokenization.folder import write_folder
from bessemer.tokenization.split import SPLIT_REGEXES
from bessemer.tokenization.tokenizer import load_tokenizer
from tests.cases import slow_but
from tests.tokenization.hostile import hostile_strings
from tests.tokenization.published import SHAPES, write_published

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

VOCAB_SIZE = 600

_SYLLABLES = ["ba", "den", "kor", "li", "mo", "nu", "pre", "sta", "ter", "und", "ver", "wir", "zo", "ing", "tion", "ed", "ly"]


def synthetic_corpus(documents: int = 120) -> list[str]:
    """Made-up prose and code, with a little of other scripts: the same on every machine."""
    draw = random.Random(5)
    words = ["".join(draw.choices(_SYLLABLES, k=draw.randint(1, 3))) for _ in range(300)]
    texts = []
    for number in range(documents):
        chosen = [words[int(len(words) * draw.random() ** 2)] for _ in range(draw.randint(20, 120))]
        text = " ".join(chosen).capitalize() + f".\n\ndef {chosen[0]}(x={number}):\n    return x + {draw.randint(0, 9999)}\n"
        texts.append(text + draw.choice(["", "Größe naïve café\n", "日本語のテキスト\n", "👩‍👩‍👧 don't we'll\n"]))
    return texts


def train(config: TokenizeConfig, texts):
    """The vocabulary of the settings."""
    return train_vocabulary(texts, config.algorithm, config.learned_tokens, split=config.split, trainer=config.trainer)


def write_corpus(folder, texts, sources=None):
    """A documents folder in which every fifth document is held out."""
    ids = [hash_bytes(b"test", str(index).encode()) for index in range(len(texts))]
    columns = {
        "id": ids,
        "text": texts,
        "text_hash": ids,
        "source": sources or ["test"] * len(texts),
        "url": [None] * len(texts),
        "language": [None] * len(texts),
        "license": [None] * len(texts),
        "split": ["validation" if index % 5 == 0 else "train" for index in range(len(texts))],
        "metadata": [None] * len(texts),
    }
    write_documents(folder, [pa.table(columns, schema=SCHEMA)])
    return folder


@pytest.fixture(scope="session")
def corpus():
    return synthetic_corpus()


@pytest.fixture(scope="session")
def documents(corpus, tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "documents", corpus)


@pytest.fixture(scope="session", params=slow_but(["gpt-2", "qwen35"], sorted(SPLIT_REGEXES)))
def any_tokenizer(request, corpus, tmp_path_factory):
    """A tokenizer trained with each of the named regexes in turn."""
    folder = tmp_path_factory.mktemp(request.param)
    tokens = train_bpe(corpus, VOCAB_SIZE - 259, SPLIT_REGEXES[request.param])
    write_folder(folder, byte_level_bpe(tokens, request.param))
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def tokenizer(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_folder(folder, byte_level_bpe(train_bpe(corpus, VOCAB_SIZE - 259, SPLIT_REGEXES["qwen2"]), "qwen2"))
    return load_tokenizer(folder)


ALGORITHMS = ("bpe", "unigram", "sentencepiece_bpe", "wordpiece", "word", "character", "byte")


@pytest.fixture(scope="session")
def tokenizers_by_algorithm(corpus, tmp_path_factory):
    """A tokenizer trained with each algorithm; of Unigram, the corpus yields a smaller vocabulary."""
    folder = tmp_path_factory.mktemp("algorithms")
    for algorithm in ALGORITHMS:
        size = 480 if algorithm == "unigram" else VOCAB_SIZE
        write_folder(folder / algorithm, train(TokenizeConfig(algorithm=algorithm, vocab_size=size), corpus))
    return {algorithm: load_tokenizer(folder / algorithm) for algorithm in ALGORITHMS}


@pytest.fixture(scope="session")
def published_tokenizers(corpus, tmp_path_factory):
    """A tokenizer in the shape of each of some published models."""
    folder = tmp_path_factory.mktemp("published")
    return {shape: load_tokenizer(write_published(folder / shape, shape, corpus)) for shape in SHAPES}


#: On every run the algorithms that cut words into pieces, and two published shapes.
USUAL = ("bpe", "unigram", "sentencepiece_bpe", "wordpiece", "byte", "llama2", "t5")


@pytest.fixture(scope="session", params=slow_but(USUAL, [*ALGORITHMS, *SHAPES]))
def every_tokenizer(request, tokenizers_by_algorithm, published_tokenizers):
    """A tokenizer of each algorithm and of each published shape in turn."""
    return (tokenizers_by_algorithm | published_tokenizers)[request.param]


@pytest.fixture(scope="session")
def hostile_texts():
    return hostile_strings(10_000)
