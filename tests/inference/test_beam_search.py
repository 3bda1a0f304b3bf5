from __future__ import annotations

import itertools
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from bessemer.core.errors import RequestError
from bessemer.inference.request_builder import BeamSearch
from bessemer.inference.sampling.sampler import SamplingParams, SamplingState
from bessemer.model.storage.folder import save_model
from tests.cases import slow_but
from tests.model.randomised import SHAPES, random_decoder
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer

PROMPTS = [[1], [5, 9, 33, 7, 7], [100, 12, 60]]


NAMES = ["grouped", "multi-head, untied"]


@pytest.fixture(scope="module", params=NAMES)
def models(request, tmp_path_factory):
    """One model twice: ours, and as `transformers` reads it."""
    folder = tmp_path_factory.mktemp("model")
    decoder = random_decoder(SHAPES[request.param].with_changes(vocab_size=VOCAB_SIZE))
    save_model(decoder, folder / "model", tokenizer=write_small_tokenizer(folder / "tokenizer"))
    return decoder, AutoModelForCausalLM.from_pretrained(folder / "model")


def state_of(vocab_size=VOCAB_SIZE, end_tokens=(), **settings):
    return SamplingState(SamplingParams(**settings), prompt=[1], vocab_size=vocab_size, end_tokens=end_tokens)


def of_model(decoder, seen=None):
    @torch.no_grad()
    def next_logits(sequences, parents):
        if seen is not None:
            seen.append((sequences, parents))
        return decoder(torch.tensor(sequences))[:, -1]

    return next_logits


def beam_search(next_logits, prompt, state, limit):
    """The best beams of a search whose logits a function gives."""
    search = BeamSearch(prompt, state, limit)
    while not search.finished:
        search.advance(next_logits(search.sequences, search.parents))
    return search.best


#: Tokens that end a beam: so that beams end not at all, late and early.
ENDS = {"none": [], "one": [3], "some": list(range(0, 60, 3)), "half": list(range(0, 250, 2))}
WIDTHS, PENALTIES = [2, 5], [1.0, 0.0, 2.5, -1.0]
USUAL = {
    *itertools.product(["grouped"], [5], PENALTIES[:2], ["some"]),
    *itertools.product(["grouped"], [2], [1.0], ["none", "half"]),
}


@pytest.mark.parametrize(
    ("models", "width", "penalty", "ends"),
    slow_but(USUAL, itertools.product(NAMES, WIDTHS, PENALTIES, ENDS)),
    indirect=["models"],
)
def test_beams_are_those_of_transformers(models, ends, penalty, width):
    (decoder, theirs), ends = models, ENDS[ends]
    for prompt in PROMPTS:
        ours = beam_search(
            of_model(decoder), prompt, state_of(end_tokens=ends, beam_width=width, n=width, length_penalty=penalty), 8
        )
        found = theirs.generate(
            torch.tensor([prompt]),
            max_new_tokens=8,
            do_sample=False,
            num_beams=width,
            num_return_sequences=width,
            length_penalty=penalty,
            eos_token_id=ends or None,
            pad_token_id=VOCAB_SIZE - 1,
            return_dict_in_generate=True,
            output_scores=True,
        )
        expected = [cut(tokens[len(prompt) :].tolist(), ends) for tokens in found.sequences]
        assert [beam.tokens for beam in ours] == expected
        assert [beam.score for beam in ours] == pytest.approx(found.sequences_scores.tolist(), rel=1e-5)


def cut(tokens, ends):
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: end + 1]


def test_one_beam_without_ends_is_greedy(models):
    decoder, _ = models
    (beam,) = beam_search(of_model(decoder), [4, 5], state_of(beam_width=1), 10)
    tokens = [4, 5]
    with torch.no_grad():
        for _ in range(10):
            tokens.append(int(decoder(torch.tensor([tokens]))[0, -1].argmax()))
    assert beam.tokens == tokens[2:]


def test_bias_and_bans_are_those_of_transformers(models):
    decoder, theirs = models
    settings = {"banned_tokens": [7, 90], "logit_bias": {11: 2.0, 12: -1.0}}
    state = state_of(end_tokens=[3, 6, 9], beam_width=3, n=3, min_tokens=4, **settings)
    ours = beam_search(of_model(decoder), [5, 9], state, 10)
    found = theirs.generate(
        torch.tensor([[5, 9]]),
        max_new_tokens=10,
        min_new_tokens=4,
        do_sample=False,
        num_beams=3,
        num_return_sequences=3,
        suppress_tokens=[7, 90],
        sequence_bias=[[[11], 2.0], [[12], -1.0]],
        eos_token_id=[3, 6, 9],
        pad_token_id=VOCAB_SIZE - 1,
    )
    assert [beam.tokens for beam in ours] == [cut(tokens[2:].tolist(), [3, 6, 9]) for tokens in found]
    assert state.answer == []


def table(sequences, parents):
    """Three tokens whose log-probabilities depend on the last one; the likeliest first token leads nowhere good."""
    rows = {9: [0.5, 0.4, 0.1], 0: [0.34, 0.33, 0.33], 1: [0.02, 0.08, 0.9], 2: [0.4, 0.3, 0.3]}
    return torch.tensor([rows[sequence[-1]] for sequence in sequences]).log()


def test_a_beam_finds_what_greedy_misses():
    best, second = beam_search(table, [9], state_of(3, beam_width=2, n=2), 2)
    by_share = sorted(itertools.product(range(3), repeat=2), key=lambda pair: -share(*pair))
    assert [tuple(best.tokens), tuple(second.tokens)] == by_share[:2] == [(1, 2), (0, 0)]
    assert math.exp(best.log_prob) == pytest.approx(0.36) and best.score == pytest.approx(best.log_prob / 2)


def share(first, second):
    return table([[9]], [])[0, first].exp().item() * table([[first]], [])[0, second].exp().item()


def test_each_step_tells_which_beam_a_sequence_continues(models):
    seen = []
    beam_search(of_model(models[0], seen), [4, 5], state_of(beam_width=3), 6)
    assert seen[0] == ([[4, 5]], [-1])
    for (before, _), (sequences, parents) in itertools.pairwise(seen):
        assert [sequence[:-1] for sequence in sequences] == [before[parent] for parent in parents]
        assert len({tuple(sequence) for sequence in sequences}) == 3


def test_all_beams_may_end_before_the_limit():
    state = state_of(3, end_tokens=[0, 1, 2], beam_width=2, n=2)
    assert [beam.tokens for beam in beam_search(table, [9], state, 5)] == [[0], [1]]


def test_logits_that_are_not_finite_are_reported():
    with pytest.raises(RequestError, match="not finite"):
        beam_search(lambda sequences, parents: torch.full((1, 3), math.nan), [1], state_of(3, beam_width=2), 2)


def test_beams_with_nothing_allowed_are_refused():
    state = state_of(3, beam_width=2, allowed_tokens=[0], end_tokens=[0], min_tokens=2)
    with pytest.raises(RequestError, match="no token may come next"):
        beam_search(table, [9], state, 4)
