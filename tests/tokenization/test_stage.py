import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from bessemer.core.errors import ConfigError
from bessemer.core.hashing import hash_file, hash_value
from bessemer.core.progress import Silent, _SilentTask
from bessemer.data.corpus.reader import iterate_documents
from bessemer.tokenization.config import TOKENIZE_VERSION, TokenizeConfig
from bessemer.tokenization.existing import copy_tokenizer, existing_fingerprint
from bessemer.tokenization.shards import ShardWriter, TokenShards
from bessemer.tokenization.stage import CHECKPOINTS, TrainingTexts, bytes_by_source, sampling_rates, tokenize
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer
from tests.cases import slow
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
    assert (TOKENIZE_VERSION, content_hash(done[0])) == (3, "24018f6e8069e18343dcc50c22f462ec")


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


@pytest.mark.parametrize("threads", ["1", slow("5")])
def test_the_number_of_threads_does_not_show_in_the_output(done, documents, tmp_path, threads):
    code = (
        "import sys; from pathlib import Path; from tests.tokenization.test_stage import run, content_hash;"
        "out = Path(sys.argv[2]); run(Path(sys.argv[1]), out); print(content_hash(out))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code, str(documents), str(tmp_path)],
        env=os.environ | {"RAYON_NUM_THREADS": threads},
        capture_output=True,
        encoding="utf-8",
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


def bytes_of(out):
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in artefacts(out)}


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("closed", [slow(1), 3, slow(6)])
def test_an_interrupted_stage_goes_on_behind_its_last_closed_file(done, documents, tmp_path, monkeypatch, closed):
    close_shard = ShardWriter._close_shard
    files = []

    def close_and_stop(writer):
        close_shard(writer)
        files.append(writer)
        if len(files) == closed:
            raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "_close_shard", close_and_stop)
        patch.setattr("bessemer.tokenization.stage._ENCODED_AT_ONCE", 3000)
        with pytest.raises(StoppedError):
            run(documents, tmp_path)
    encoded = []
    with monkeypatch.context() as patch:
        encode_flat = Tokenizer.encode_flat
        patch.setattr(Tokenizer, "encode_flat", lambda self, texts: encoded.extend(texts) or encode_flat(self, texts))
        patch.setattr("bessemer.tokenization.stage.train_vocabulary", lambda *_: pytest.fail("the tokenizer is trained anew"))
        run(documents, tmp_path)
    assert bytes_of(tmp_path) == bytes_of(done[0])
    tokens = sum(done[1][split]["tokens"] for split in ("train", "validation"))
    saved = min(closed * CONFIG.shard_tokens, done[1]["train"]["tokens"])
    size = sum(done[1][split]["bytes"] for split in ("train", "validation"))
    assert sum(map(len, encoded)) / size < 1 - saved / tokens + 0.05


def test_what_other_settings_left_is_made_again(done, documents, tmp_path):
    run(documents, tmp_path, vocab_size=400)
    run(documents, tmp_path)
    assert bytes_of(tmp_path) == bytes_of(done[0])


def test_a_tokenizer_that_was_damaged_meanwhile_is_trained_again(done, documents, tmp_path):
    run(documents, tmp_path)
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    run(documents, tmp_path)
    assert bytes_of(tmp_path) == bytes_of(done[0])


_KILLED = """
import sys, time
from pathlib import Path
from bessemer.tokenization.shards import ShardWriter
from tests.tokenization.test_stage import run
close_shard = ShardWriter._close_shard
def close_and_wait(writer):
    close_shard(writer)
    if len(writer._shards) == 3:
        print("closed", flush=True)
        time.sleep(60)
ShardWriter._close_shard = close_and_wait
run(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.skipif(os.name == "nt", reason="kill -9 is POSIX")
def test_a_killed_stage_goes_on_to_the_same_bytes(done, documents, tmp_path):
    arguments = [sys.executable, "-c", _KILLED, str(documents), str(tmp_path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, encoding="utf-8") as killed:
        assert killed.stdout.readline() == "closed\n"
        killed.kill()
    assert not (tmp_path / "tokens" / "train" / "shards.json").exists()
    run(documents, tmp_path)
    assert bytes_of(tmp_path) == bytes_of(done[0])


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory):
    """Two sources of the same size; one says "aa", the other "bb"."""
    texts = [word * 200 + f" {number}" for number in range(500) for word in ("aa", "bb")]
    return write_corpus(tmp_path_factory.mktemp("two") / "documents", texts, ["a", "b"] * 500)


def test_text_is_drawn_by_the_weight_of_its_source(two_sources):
    sizes = bytes_by_source(two_sources, Silent())["train"]
    rates = sampling_rates(sizes, {"b": 3.0}, sum(sizes.values()) // 4)
    texts = TrainingTexts(two_sources, rates, 5, _SilentTask())
    drawn = Counter(text[0] for text in texts)
    assert 2.2 < drawn["b"] / drawn["a"] < 4
    assert texts.bytes == pytest.approx(sum(sizes.values()) / 4, rel=0.2)
    assert list(texts) == list(TrainingTexts(two_sources, rates, 5, _SilentTask()))
    assert list(texts) != list(TrainingTexts(two_sources, rates, 6, _SilentTask()))


@pytest.mark.parametrize(
    ("weights", "most_bytes", "expected"),
    [
        ({}, 1000, {"a": 1, "b": 1}),
        ({}, 100, {"a": 0.25, "b": 0.25}),
        ({"a": 2}, 1000, {"a": 1, "b": 0.5}),  # no rate exceeds 1, and the proportion stays
        ({"a": 2}, 250, {"a": 0.5 * 250 / 125, "b": 0.25 * 250 / 125}),
        ({"a": 0}, 150, {"a": 0, "b": 0.5}),
        ({"a": 4, "b": 2}, 1000, {"a": 1, "b": 0.5}),
    ],
)
def test_rates_are_proportional_to_weights_and_as_high_as_the_limit_allows(weights, most_bytes, expected):
    rates = sampling_rates({"a": 100, "b": 300}, weights, most_bytes)
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"whels": 2}, r"source_weights: the documents have no source 'whels'; did you mean 'wheels'\?"),
        ({"wheels": 0, "docs": 0}, "every source with text has the weight 0"),
    ],
)
def test_weights_that_cannot_be_followed_are_refused(weights, message):
    with pytest.raises(ConfigError, match=message):
        sampling_rates({"wheels": 100, "docs": 300}, weights, 100)


class Told(Silent):
    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


def test_an_existing_tokenizer_encodes_and_nothing_is_trained(done, documents, tmp_path, monkeypatch):
    monkeypatch.setattr("bessemer.tokenization.stage.train_vocabulary", lambda *_: pytest.fail("trained"))
    (tmp_path / "given").mkdir()
    for path in (done[0] / "tokenizer").iterdir():
        (tmp_path / "given" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "given" / "model.safetensors").write_bytes(b"a model's folder has more")
    told = Told()
    config = CONFIG.with_changes(tokenizer="given", vocab_size=1000)
    metrics = tokenize(config, documents, tmp_path / "out", seed=9, progress=told, folder=tmp_path)
    assert bytes_of(tmp_path / "out") == bytes_of(done[0])
    assert (metrics["algorithm"], metrics["vocab_size"], metrics["training_bytes"]) == ("bpe", 500, None)
    assert any("no effect: vocab_size" in line for line in told.lines)


def test_a_changed_existing_tokenizer_is_another_stage_wherever_it_lies(done, tmp_path):
    copies = [tmp_path / name for name in ("a", "b")]
    for copy in copies:
        copy_tokenizer(done[0] / "tokenizer", copy)
    prints = [existing_fingerprint(str(copy), tmp_path) for copy in copies]
    assert prints[0] == prints[1]
    config = json.loads((copies[1] / "tokenizer_config.json").read_text(encoding="utf-8"))
    (copies[1] / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "x"}), encoding="utf-8")
    assert existing_fingerprint("b", tmp_path) != prints[0]
    settings = [CONFIG.with_changes(tokenizer=name).output_settings() for name in ("a", "b")]
    assert settings[0] == settings[1]


@pytest.mark.parametrize(("path", "message"), [("nowhere", "nowhere: no such folder"), (".", r"\.: not a tokenizer's folder")])
def test_a_folder_without_a_tokenizer_is_refused_in_a_line(tmp_path, path, message):
    with pytest.raises(ConfigError, match=f"^tokenize.tokenizer: {message}"):
        existing_fingerprint(path, tmp_path)


def test_the_baselines_are_measured_on_the_held_out_text(done, documents):
    texts = [text for batch in iterate_documents(documents, ["text"], "validation") for text in batch["text"].to_pylist()]
    size = sum(len(text.encode()) for text in texts)
    baselines = done[1]["baselines"]
    assert baselines["byte"] == 1
    assert baselines["character"] == pytest.approx(size / sum(map(len, texts)), abs=1e-4)
    assert baselines["word"] == pytest.approx(size / sum(len(text.split()) for text in texts), abs=1e-4)
    assert done[1]["fertility"] == pytest.approx(baselines["word"] / done[1]["validation"]["bytes_per_token"], abs=1e-3)
