"""Watermarks: what they do to the distribution, that the key finds them, and that nothing else does."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bessemer.cli.watermark import watermark_of
from bessemer.core.errors import ConfigError
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.inference.sampling.params import WatermarkConfig
from bessemer.inference.sampling.watermark import Watermark, detect, token_numbers
from bessemer.model.storage.folder import save_model
from tests.cases import slow
from tests.cli.test_main import bessemer, one_error
from tests.inference.models import small_decoder, small_tokenizer
from tests.inference.test_sampling import LOGITS_V

KEY = "a key of the tests"
MARKS = [WatermarkConfig(key=KEY), WatermarkConfig(key=KEY, method="green")]
LONG = SamplingParams(max_tokens=120, ignore_eos=True, seed=3)


def by_method(mark):
    return mark.method


def error_of(capsys, *words):
    """The one line of a command that is refused with exit code 2."""
    status, _, err = bessemer(capsys, *words)
    assert status == 2
    return one_error(err)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("marked"))


@pytest.fixture(scope="module")
def model():
    return small_decoder("dense")


def distance_from_uniform(numbers):
    """The Kolmogorov–Smirnov statistic times the root of the count; above 1.63 once in a hundred times."""
    ordered, count = np.sort(numbers), len(numbers)
    places = np.arange(count)
    return math.sqrt(count) * max((ordered - places / count).max(), ((places + 1) / count - ordered).max())


def test_numbers_are_uniform_over_tokens_contexts_and_keys():
    tokens = np.arange(5000)
    first = token_numbers(KEY, (1, 2, 3, 4), tokens)
    assert distance_from_uniform(first) < 1.63
    assert distance_from_uniform(np.array([token_numbers(KEY, (place,), np.array([7]))[0] for place in range(2000)])) < 1.63
    for others in (token_numbers(KEY, (1, 2, 4, 3), tokens), token_numbers(KEY + "!", (1, 2, 3, 4), tokens), first[::-1]):
        assert abs(np.corrcoef(first, others)[0, 1]) < 0.05


@pytest.mark.parametrize("mark", MARKS, ids=by_method)
def test_p_values_of_texts_without_a_mark_are_uniform(mark):
    generator = np.random.default_rng(0)
    # as text is: few tokens make up most of it
    texts = generator.zipf(1.4, (600, 40)) % 500
    assert distance_from_uniform([detect(text.tolist(), mark).p_value for text in texts]) < 1.63


def test_tails_are_those_of_the_distributions():
    tokens = list(range(40))
    numbers = np.array([token_numbers(KEY, tokens[at - 4 : at], np.array([tokens[at]]))[0] for at in range(4, 40)])
    gumbel, green = (detect(tokens, mark) for mark in MARKS)
    assert gumbel.tokens == green.tokens == 36
    expected = torch.special.gammaincc(torch.tensor(36.0).double(), torch.tensor(-np.log1p(-numbers).sum())).item()
    assert gumbel.p_value == pytest.approx(expected, rel=1e-6)
    count = int((numbers < 0.25).sum())
    tail = [math.comb(36, of) * 0.25**of * 0.75 ** (36 - of) for of in range(count, 37)]
    # between the probability of more green tokens and that of as many or more
    assert sum(tail[1:]) < green.p_value < sum(tail)
    assert green.score == pytest.approx((count - 9) / math.sqrt(36 * 0.25 * 0.75))
    assert detect([1, 2, 3], MARKS[0]) == (0, 0.0, 1.0)


def test_over_keys_gumbel_draws_from_the_models_own_distribution():
    weights_V, draws = LOGITS_V.softmax(-1).numpy(), 6000
    chosen = [Watermark(WatermarkConfig(key=f"{KEY} {place}")).chosen(weights_V, None, [1, 2, 3, 4]) for place in range(draws)]
    expected_V = weights_V * draws
    common_V = expected_V > 5
    found_V = np.bincount(chosen, minlength=len(weights_V))
    statistic = ((found_V - expected_V)[common_V] ** 2 / expected_V[common_V]).sum()
    # of 10 degrees of freedom: once in a thousand times above
    assert common_V.sum() == 11 and statistic < 29.6


@pytest.mark.parametrize("mark", MARKS, ids=by_method)
def test_the_key_finds_an_answer_and_no_other_key_does(model, tokenizer, mark):
    engine = Engine(model, tokenizer, config=EngineConfig(watermark=mark))
    marked, plain = engine.generate([[5, 6, 7]] * 2, [LONG, LONG.with_changes(temperature=0.0)])
    own = detect(marked.token_ids, mark)
    assert own.tokens == 116 and own.p_value < 1e-6
    assert detect(marked.token_ids, mark.with_changes(key=KEY + "!")).p_value > 1e-3
    # a piece from the middle holds it as well, and the prompt is not needed
    assert detect(marked.token_ids[40:100], mark).p_value < 1e-3
    unmarked = Engine(model, tokenizer).generate([[5, 6, 7]] * 2, [LONG, LONG.with_changes(temperature=0.0)])
    assert detect(unmarked[0].token_ids, mark).p_value > 1e-3
    # nothing is drawn at temperature 0, where only a list of favoured tokens marks
    assert (plain.token_ids == unmarked[1].token_ids) == (mark.method == "gumbel")


@pytest.mark.parametrize("mark", [MARKS[0], slow(MARKS[1])], ids=by_method)
def test_drafts_neighbours_and_log_probabilities_change_nothing(model, tokenizer, tmp_path, mark):
    params = LONG.with_changes(watermark=mark, max_tokens=40, top_k=50, logprobs=0, logprobs_mode="sampled")
    expected = Engine(model, tokenizer).generate([[5, 6, 7]], params)[0]
    together = Engine(model, tokenizer).generate([[9], [5, 6, 7], [5, 6, 7]], [LONG, params, params.with_changes(top_k=0)])
    assert together[1].token_ids == expected.token_ids
    save_model(small_decoder("dense", seed=1), tmp_path / "draft", tokenizer=tokenizer.folder)
    ngram, draft = (
        Engine(model, tokenizer, config=EngineConfig(speculation={"tokens": 4, "adapt": False, **of_method})).generate(
            [[5, 6, 7]], params.with_changes(max_tokens=60)
        )[0]
        for of_method in ({"method": "ngram"}, {"method": "draft", "model": str(tmp_path / "draft")})
    )
    assert ngram.token_ids[:40] == expected.token_ids
    # a draft model's tokens take numbers of the request's own, so the first tokens are others
    assert detect(draft.token_ids, mark).p_value < 1e-4
    # of what is drawn from, the mark of gumbel left out
    assert all(-20 < one.log_probs.token < 0 for one in expected.log_probs)


def test_what_cannot_carry_a_mark_is_refused():
    with pytest.raises(ConfigError, match="gumbel marks what is drawn"):
        SamplingParams.parse({"temperature": 0, "watermark": MARKS[0]})
    with pytest.raises(ConfigError, match="beam search does not take watermark"):
        SamplingParams.parse({"temperature": 0, "beam_width": 2, "watermark": MARKS[1]})
    assert KEY not in repr(MARKS[0])


def test_a_key_is_made_and_marks_what_is_generated_and_texts_are_tested(model, tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(model, tmp_path / "model", tokenizer=tokenizer.folder)
    assert bessemer(capsys, "watermark", "mark.yaml", "--new", "--method", "green")[0] == 0
    assert (tmp_path / "mark.yaml").stat().st_mode & 0o77 == 0
    made = ("generate", "model", "iron", "--max-tokens", "20", "--temperature", "1", "--seed", "1")
    marked, again, plain = (bessemer(capsys, *made, *more) for more in (("--watermark", "mark.yaml"),) * 2 + ((),))
    assert marked[0] == 0 and marked == again != plain
    assert bessemer(capsys, "watermark", "drawn.yaml", "--new")[0] == 0
    at_zero = error_of(capsys, "generate", "model", "iron", "--temperature", "0", "--watermark", "drawn.yaml")
    assert "gumbel marks what is drawn" in at_zero
    # a random model writes no text that is read as the same tokens: letters, each the greenest
    key = watermark_of(tmp_path / "mark.yaml").key
    letters = np.array([tokenizer.encode(letter, add_bos=False)[0] for letter in "bcdfghjkmpqvwxz"])
    ids = letters[:4].tolist()
    while len(ids) < 80:
        ids.append(int(letters[token_numbers(key, ids[-4:], letters).argmin()]))
    for name, text in (("marked.txt", tokenizer.decode(ids)), ("plain.txt", "bcdfghjkmpqvwxz" * 4)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    status, shown, _ = bessemer(capsys, "watermark", "mark.yaml", "marked.txt", "plain.txt", "--model", "model")
    of_marked, of_plain = (line.rpartition("p = ")[2] for line in shown.splitlines())
    assert status == 0 and float(of_marked) < 1e-9 and float(of_plain) > 1e-4
    assert "is there already" in error_of(capsys, "watermark", "mark.yaml", "--new")
    assert "give the model" in error_of(capsys, "watermark", "mark.yaml", "marked.txt")
    assert "nothing.yaml: cannot be read" in error_of(capsys, "watermark", "nothing.yaml", "marked.txt", "--model", "model")
    (tmp_path / "short.yaml").write_text("key: short\n", encoding="utf-8")
    assert "short.yaml:1: key" in error_of(capsys, "serve", "model", "--watermark", "short.yaml")
