import os
import subprocess
import sys

import numpy as np
import pytest

from bessemer.core.errors import ConfigError
from bessemer.core.hashing import hash_file, hash_value
from bessemer.core.progress import Silent
from bessemer.data.documents import iterate_documents
from bessemer.tokenization.config import TOKENIZE_VERSION, TokenizeConfig
from bessemer.tokenization.shards import TokenShards
from bessemer.tokenization.stage import CHECKPOINTS, tokenize
from bessemer.tokenization.tokenizer import load_tokenizer
from tests.tokenization.conftest import write_corpus

CONFIG = TokenizeConfig(vocab_size=500, shard_tokens=2000)


def run(documents, out, **changes):
    return tokenize(CONFIG.with_changes(**changes), documents, out, seed=3, progress=Silent())


def artefacts(out):
    """The files that the store would keep."""
    return [path for path in out.rglob("*") if path.is_file() and CHECKPOINTS not in path.parts]


def content_hash(out):
    """Hash of what the stage wrote, but for its scratch, and Parquet, whose bytes belong to pyarrow's version."""
    files = sorted(path for path in artefacts(out) if path.suffix != ".parquet")
    index = [TokenShards(out / "tokens" / split).documents().to_pylist() for split in ("train", "validation")]
    return hash_value([[[path.relative_to(out).as_posix(), hash_file(path)] for path in files], index])


@pytest.fixture(scope="module")
def done(documents, tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenize")
    return out, run(documents, out)


def test_the_output_is_the_one_of_this_version(done):
    """Fails when the stage's output changed: raise TOKENIZE_VERSION and put the new hash here."""
    assert (TOKENIZE_VERSION, content_hash(done[0])) == (1, "73aafd67be94fd9a54857ed0e7e4293e")


def test_both_splits_hold_their_documents_in_order(done, documents):
    out, metrics = done
    tokenizer = load_tokenizer(out / "tokenizer")
    for split in ("train", "validation"):
        texts = [text for batch in iterate_documents(documents, ["text"], split) for text in batch["text"].to_pylist()]
        shards = TokenShards(out / "tokens" / split)
        expected = [id for text in texts for id in tokenizer.encode(text)]
        assert shards.read(0, shards.tokens).tolist() == [*expected, tokenizer.bos_id]
        assert shards.bytes == sum(len(text.encode()) for text in texts)
        assert shards.tokenizer_hash == tokenizer.hash
        assert metrics[split]["bytes_per_token"] == pytest.approx(shards.bytes / (len(expected) - len(texts)), abs=1e-4)


def test_the_number_of_threads_does_not_show_in_the_output(done, documents, tmp_path):
    code = (
        "import sys; from pathlib import Path; from tests.tokenization.test_stage import run, content_hash;"
        "out = Path(sys.argv[2]); run(Path(sys.argv[1]), out); print(content_hash(out))"
    )
    for threads in ("1", "5"):
        (tmp_path / threads).mkdir()
        finished = subprocess.run(
            [sys.executable, "-c", code, str(documents), str(tmp_path / threads)],
            env=os.environ | {"RAYON_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        )
        assert finished.stdout.strip() == content_hash(done[0])


def test_the_vocabulary_is_described(done):
    out, metrics = done
    tokenizer = load_tokenizer(out / "tokenizer")
    assert metrics["vocab_size"] == 500
    assert metrics["encoder"] == "fastokens"
    assert len(metrics["longest_tokens"][0].encode()) == max(len(tokenizer.token_bytes(id)) for id in range(497))
    assert len(metrics["vocabulary_sample"]) == 24
    assert 0 <= metrics["unused_tokens"] < 241 and 0 < metrics["unused_bytes"] < 256
    assert metrics["fertility"] > 1


def test_the_sample_text_is_shown_in_its_tokens(done, documents):
    _, metrics = done
    texts = [text for batch in iterate_documents(documents, ["text"], "validation") for text in batch["text"].to_pylist()]
    assert any(text.startswith("".join(metrics["sample_tokens"])) for text in texts)


def test_training_on_a_share_takes_about_that_many_bytes_and_the_same_each_time(documents, tmp_path):
    total = sum(
        len(text.encode()) for batch in iterate_documents(documents, ["text"], "train") for text in batch["text"].to_pylist()
    )
    metrics = [run(documents, tmp_path / name, vocab_size=300, training_bytes=total // 2) for name in ("a", "b")]
    assert 0.3 * total < metrics[0]["training_bytes"] < 0.7 * total
    assert content_hash(tmp_path / "a") == content_hash(tmp_path / "b")
    assert metrics[0]["train"]["bytes"] == total


def test_unused_tokens_are_those_that_the_training_text_never_needs(done):
    out, metrics = done
    tokenizer = load_tokenizer(out / "tokenizer")
    shards = TokenShards(out / "tokens" / "train")
    used = np.unique(shards.read(0, shards.tokens))
    assert metrics["unused_tokens"] == tokenizer.vocab_size - 3 - 256 - int(((used >= 256) & (used < 497)).sum())


def test_unused_bytes_are_those_that_the_training_text_lacks_whatever_is_held_out(tmp_path):
    metrics = run(write_corpus(tmp_path / "documents", ["é\n", "abab abab"]), tmp_path / "out", vocab_size=261)
    assert metrics["unused_bytes"] == 255  # the space alone: the rest is "abab"


def test_a_corpus_without_training_documents_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no training documents"):
        run(write_corpus(tmp_path / "documents", ["only a held-out document"]), tmp_path / "out")


def test_a_corpus_too_small_for_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="too small for this vocabulary"):
        run(write_corpus(tmp_path / "documents", ["held out", "abc"]), tmp_path / "out")


def test_a_corpus_without_validation_documents_still_works(tmp_path, corpus):
    metrics = run(write_corpus(tmp_path / "documents", ["", *corpus[1:5]]), tmp_path / "out", vocab_size=270)
    assert metrics["validation"]["bytes_per_token"] is None
