import numpy as np
import pytest

from bessemer.core.progress import Silent
from bessemer.tokenization import algorithms
from bessemer.tokenization.config import TokenizeConfig
from bessemer.tokenization.folder import write_folder
from bessemer.tokenization.measure import (
    DOMAINS,
    LANGUAGES,
    TextCounts,
    by_domain,
    control_tokens_of,
    describe,
    sample_text,
    shown_token,
    token_usage,
    unknown_share,
    vocabulary_metrics,
)
from bessemer.tokenization.stage import tokenize
from bessemer.tokenization.tokenizer import load_tokenizer

ALGORITHMS = ("bpe", "unigram", "sentencepiece_bpe", "wordpiece", "word", "character", "byte")


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A tokenizer of each algorithm, by name, each made when it is first asked for."""
    made = {}

    def get(algorithm):
        if algorithm not in made:
            folder = tmp_path_factory.mktemp(algorithm)
            config = TokenizeConfig(algorithm=algorithm, vocab_size=600)
            write_folder(folder, algorithms.train_vocabulary(corpus, algorithm, config.learned_tokens), config.chat_template)
            made[algorithm] = load_tokenizer(folder)
        return made[algorithm]

    return get


def test_every_sample_is_one_to_two_kilobytes_of_text_that_travels_in_the_package():
    for name in (*DOMAINS, *LANGUAGES):
        assert 700 < len(sample_text(name).encode()) < 2200


def test_bytes_have_the_figures_that_follow_from_the_text(trained):
    figures = by_domain(trained("byte"))
    for name in (*DOMAINS, *LANGUAGES):
        text = sample_text(name)
        size = len(text.encode())
        assert (figures[name]["tokens"], figures[name]["bytes_per_token"], figures[name]["round_trip"]) == (size, 1, True)
        if figures[name]["fertility"] is not None:
            assert figures[name]["fertility"] == pytest.approx(size / len(text.split()), abs=1e-4)
    assert figures["thai"]["fertility"] is None
    assert figures["hindi"]["tokens_to_english"] == pytest.approx(
        figures["hindi"]["bytes"] / figures["english"]["bytes"], abs=1e-4
    )
    assert "tokens_to_english" not in figures["prose"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_is_measured_and_loses_what_it_is_known_to_lose(trained, algorithm):
    tokenizer = trained(algorithm)
    figures = by_domain(tokenizer)
    lossy = algorithm in ("wordpiece", "word")
    assert tokenizer.lossless is not lossy
    assert figures["python"]["round_trip"] is not lossy
    assert (figures["thai"]["unknown_share"] is None) is not lossy
    if lossy:
        assert figures["thai"]["unknown_share"] > 0.5


def test_the_share_of_unknown_tokens_is_counted(trained):
    tokenizer = trained("wordpiece")
    usage = token_usage(tokenizer, ["ba ж ba ж"])
    assert unknown_share(tokenizer, usage) == 0.5


def test_usage_is_that_of_encoding_one_by_one(trained, corpus):
    tokenizer = trained("bpe")
    expected = np.bincount([id for text in corpus for id in tokenizer.encode(text, add_bos=False)], minlength=600)
    assert token_usage(tokenizer, iter(corpus)).tolist() == expected.tolist()


def test_unused_tokens_and_bytes_are_those_that_never_occur(trained):
    tokenizer = trained("bpe")
    figures = vocabulary_metrics(tokenizer, token_usage(tokenizer, ["ba"]))
    assert figures["unused_tokens"] == 600 - 3 - 256 - 1  # "ba" is a token
    assert figures["unused_bytes"] == 256
    assert len(figures["longest_tokens"][0].encode()) == max(len(tokenizer.token_bytes(id)) for id in range(597))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_tokenizer_is_described_beside_a_text(trained, algorithm, corpus):
    tokenizer = trained(algorithm)
    described = describe(tokenizer, "ba den", corpus[:20])
    figures = TextCounts()
    for text in corpus[:20]:
        figures.add(text)
    assert described["text_bytes"] == figures.bytes
    assert described["bytes_per_token"] == pytest.approx(figures.bytes / described["text_tokens"], abs=1e-4)
    assert described["fertility"] == pytest.approx(described["text_tokens"] / figures.words, abs=1e-4)
    assert "".join(described["sample_tokens"]).strip() == "ba den"
    assert 0 <= described["unused_bytes"] <= 256


def test_control_tokens_are_listed_as_they_are_written(trained):
    for algorithm in ("bpe", "wordpiece"):
        assert control_tokens_of(trained(algorithm))[-3:] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def test_a_part_of_a_character_is_shown_in_hexadecimal():
    assert shown_token("≥".encode()[:2]) == r"\xe2\x89"
    assert shown_token("é\n".encode()) == "é\n"


@pytest.mark.parametrize("algorithm", ["unigram", "wordpiece"])
def test_the_stage_says_what_a_tokenizer_loses(algorithm, documents, tmp_path):
    config = TokenizeConfig(algorithm=algorithm, vocab_size=600)
    metrics = tokenize(config, documents, tmp_path, seed=3, progress=Silent())
    assert metrics["algorithm"] == algorithm
    assert metrics["lossless"] is (algorithm == "unigram")
    assert ("unknown_share" in metrics) is (algorithm == "wordpiece")
    assert metrics["encoder"] == "tokenizers"
    assert list(metrics["by_domain"]) == [*DOMAINS, *LANGUAGES]
