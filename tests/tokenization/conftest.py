import os
import random

import pyarrow as pa
import pytest

from bessemer.core.hashing import hash_bytes
from bessemer.data.documents import SCHEMA, write_documents
from bessemer.tokenization.bpe import byte_level_bpe, train_bpe
from bessemer.tokenization.folder import write_folder
from bessemer.tokenization.split import SPLIT_REGEXES
from bessemer.tokenization.tokenizer import load_tokenizer

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


@pytest.fixture(scope="session", params=sorted(SPLIT_REGEXES))
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
