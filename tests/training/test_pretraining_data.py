import shutil

import pytest
import torch

from bessemer.core.errors import ConfigError
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.training.pretrain import PretrainingData


@pytest.fixture(scope="module")
def two_mixtures(tokenized, tmp_path_factory):
    """Tokens of a corpus with a second mixture, which is here what is held out."""
    tokens = tmp_path_factory.mktemp("mixtures") / "tokens"
    shutil.copytree(tokenized / "tokens", tokens)
    shutil.copytree(tokens / "validation", tokens / "anneal")
    return tokens


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({}, 7),
        ({"decay_steps": 4}, 6),
        ({"anneal_fraction": 0.2}, 8),
        ({"schedule": "cosine", "decay_fraction": None, "anneal_fraction": 0.5}, 5),
    ],
)
def test_the_second_mixture_is_read_in_the_decay_or_where_it_is_said(two_mixtures, tokenized, settings, changes, start):
    config = settings.with_changes(**{"decay_fraction": None if "decay_steps" in changes else 0.3} | changes, steps=10)
    data = PretrainingData(config, two_mixtures, load_tokenizer(tokenized / "tokenizer"))
    batches, _ = data.batches(10, seed=1)
    alone, _ = PretrainingData(config, tokenized / "tokens", load_tokenizer(tokenized / "tokenizer")).batches(10, seed=1)
    same = [torch.equal(batches.batch(step).tokens_BT, alone.batch(step).tokens_BT) for step in range(10)]
    assert same == [True] * start + [False] * (10 - start)


def test_a_schedule_without_a_decay_must_say_when_the_second_mixture_is_read(two_mixtures, tokenized, settings):
    config = settings.with_changes(schedule="cosine", decay_fraction=None)
    with pytest.raises(ConfigError, match=r"anneal_fraction: .* schedule: cosine no decay"):
        PretrainingData(config, two_mixtures, load_tokenizer(tokenized / "tokenizer"))
