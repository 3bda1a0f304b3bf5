"""Guesses that are checked change the pace of an answer and nothing else."""

from __future__ import annotations

import random
from functools import cache
from itertools import product

import pytest

from bessemer.inference.engine import SamplingParams
from bessemer.inference.speculation.proposer import Draft, Proposer
from tests.cases import slow, slow_but
from tests.inference.models import ARCHITECTURES, small_decoder, small_tokenizer
from tests.inference.test_identity import assert_same_but_for_ties, engine_of, with_pages

GREEDY = SamplingParams(temperature=0, max_tokens=18, logprobs=2, ignore_eos=True)
#: The texts repeat themselves, so that n-grams have something to guess.
PROMPTS = [[7], [9] * 20, [*range(40, 60)] * 2, [5, 6, 5, 7] * 8]
COMPANY = [[(seed * 31 + place * 7) % 250 for place in range(3 + seed * 2)] for seed in range(3)]
TOKENS = 5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("speculation"))


@pytest.fixture(scope="module")
def dense():
    return small_decoder("dense")


class Scripted(Proposer):
    """Knows what will come, and guesses that, something else, or either."""

    def __init__(self, completions, kind, tokens=TOKENS, seed=0):
        self.texts = [prompt + completion.token_ids for prompt, completion in completions]
        self.kind, self.tokens, self.random = kind, tokens, random.Random(seed)
        self.checked, self.right = 0, 0

    def propose(self, answers):
        return [Draft(self.guess(answer.sequence.tokens)) for answer in answers]

    def guess(self, tokens):
        text = next((text for text in self.texts if text[: len(tokens)] == tokens), None)
        if text is None:
            return [self.random.randrange(250) for _ in range(self.tokens)]
        right = text[len(tokens) : len(tokens) + self.tokens]
        if self.kind == "right":
            return right
        if self.kind == "wrong":
            return [(token + 1) % 250 for token in right]
        cut = self.random.randrange(self.tokens + 1)
        return right[:cut] + [(token + 1) % 250 for token in right[cut:]]

    def learn(self, answer, guessed, right):
        self.checked, self.right = self.checked + guessed, self.right + right


def speculating(model, tokenizer, proposer=None, method="ngram", blocks=None, **settings):
    settings = {"speculation": {"method": method, "tokens": TOKENS, "adapt": False}, **settings}
    engine = engine_of(model, tokenizer, **settings) if blocks is None else with_pages(model, tokenizer, blocks, **settings)
    if proposer is not None:
        engine.core.strategy.proposer = proposer
    return engine


def plainly(model, tokenizer, prompts, params, **settings):
    return [engine_of(model, tokenizer, **settings).generate([prompt], params)[0] for prompt in prompts]


def assert_all_is_back(engine):
    scheduler = engine.core.scheduler
    assert all(group.pool.free == group.pool.total for group in scheduler.groups)
    assert not scheduler.has_work and not engine.core.strategy._drafts


def in_company(engine):
    params = [GREEDY] * len(PROMPTS) + [SamplingParams(seed=seed, max_tokens=9 + seed) for seed in range(len(COMPANY))]
    completions = engine.generate(PROMPTS + COMPANY, params)[: len(PROMPTS)]
    assert_all_is_back(engine)
    return completions


@pytest.fixture(scope="module")
def expected_of(tokenizer):
    """The answers of an architecture without guesses, computed once."""
    return cache(lambda name: plainly(small_decoder(name), tokenizer, PROMPTS, GREEDY, batch_invariant=True))


KINDS = ["right", "wrong", "random"]


@pytest.mark.parametrize(
    ("name", "kind"),
    slow_but({("dense", "right"), ("windows", "random"), ("linear", "random")}, product(ARCHITECTURES, KINDS)),
)
def test_an_invariant_engine_gives_the_same_numbers_whatever_is_guessed(tokenizer, expected_of, name, kind):
    expected = expected_of(name)
    proposer = Scripted(list(zip(PROMPTS, expected, strict=True)), kind)
    assert in_company(speculating(small_decoder(name), tokenizer, proposer, batch_invariant=True)) == expected
    assert proposer.checked > 20
    assert {"right": proposer.right > 50, "wrong": proposer.right <= 2, "random": proposer.right > 20}[kind]


@pytest.mark.parametrize(
    ("name", "kind"), slow_but({*product(["dense"], KINDS), *product(ARCHITECTURES, ["random"])}, product(ARCHITECTURES, KINDS))
)
def test_tokens_are_the_same_but_for_ties_whatever_is_guessed(tokenizer, expected_of, name, kind):
    expected = expected_of(name)
    proposer = Scripted(list(zip(PROMPTS, expected, strict=True)), kind)
    for one, other in zip(in_company(speculating(small_decoder(name), tokenizer, proposer)), expected, strict=True):
        assert_same_but_for_ties(one, other)


@pytest.mark.parametrize("name", slow_but(["linear"], ARCHITECTURES))
def test_guesses_change_nothing_where_pages_run_out(tokenizer, name):
    model = small_decoder(name)
    prompts, params = [[7], [8, 9], [10]], GREEDY.with_changes(max_tokens=36)
    expected = plainly(model, tokenizer, prompts, params, batch_invariant=True)
    proposer = Scripted(list(zip(prompts, expected, strict=True)), "random")
    engine = speculating(model, tokenizer, proposer, blocks=8, batch_invariant=True)
    assert engine.generate(prompts, params) == expected
    assert engine.core.scheduler.preemptions or None not in [group.window for group in engine.core.runner.memory.groups]
    assert_all_is_back(engine)


@pytest.mark.parametrize("name", slow_but(["dense"], ARCHITECTURES))
def test_n_grams_change_nothing(tokenizer, expected_of, name):
    engine = speculating(small_decoder(name), tokenizer, batch_invariant=True)
    assert in_company(engine) == expected_of(name)
    assert engine.statistics.draft_tokens_proposed > 0


def test_right_guesses_save_steps(dense, tokenizer):
    (expected,) = plainly(dense, tokenizer, [PROMPTS[0]], GREEDY)
    engine = speculating(dense, tokenizer, Scripted([(PROMPTS[0], expected)], "right"))
    engine.generate([PROMPTS[0]], GREEDY)
    # the first step reads the prompt and makes one token, the others make 6, 6 and the last 5
    found = engine.statistics
    assert (found.drafts, found.draft_tokens_proposed, found.draft_tokens_accepted, found.steps) == (3, 14, 14, 4)


@pytest.mark.parametrize(
    "settings", [slow({}), slow({"top_k": 20, "top_p": 0.9}), {"repetition_penalty": 1.3, "presence_penalty": 0.4}]
)
def test_a_seed_gives_the_same_text_with_guesses_that_chance_had_no_part_in(dense, tokenizer, settings):
    params = SamplingParams(seed=3, max_tokens=30, temperature=0.8, ignore_eos=True, **settings)
    expected = plainly(dense, tokenizer, PROMPTS, params, batch_invariant=True)
    for kind in ("right", "random"):
        proposer = Scripted(list(zip(PROMPTS, expected, strict=True)), kind)
        engine = speculating(dense, tokenizer, proposer, batch_invariant=True)
        assert engine.generate(PROMPTS, params) == expected
        assert proposer.right > 20


@pytest.mark.parametrize("max_tokens", range(1, 9))
def test_no_guess_goes_beyond_the_limit(dense, tokenizer, max_tokens):
    (whole,) = plainly(dense, tokenizer, [PROMPTS[1]], GREEDY)
    engine = speculating(dense, tokenizer, Scripted([(PROMPTS[1], whole)], "right"))
    (completion,) = engine.generate([PROMPTS[1]], GREEDY.with_changes(max_tokens=max_tokens))
    assert completion.token_ids == whole.token_ids[:max_tokens]
    assert completion.finish_reason == "length"
    assert_all_is_back(engine)


def test_no_guess_goes_beyond_the_context(dense, tokenizer):
    prompt = [3] * (dense.config.max_position_embeddings - 7)
    (expected,) = plainly(dense, tokenizer, [prompt], GREEDY)
    assert len(expected.token_ids) == 7
    engine = speculating(dense, tokenizer, Scripted([(prompt, expected)], "right"))
    assert engine.generate([prompt], GREEDY)[0].token_ids == expected.token_ids


@pytest.mark.parametrize("place", range(7))
def test_an_answer_ends_at_an_end_token_inside_a_draft(dense, tokenizer, place):
    (whole,) = plainly(dense, tokenizer, [PROMPTS[0]], GREEDY)
    end = whole.token_ids[place]
    params = GREEDY.with_changes(stop_token_ids=[end])
    engine = speculating(dense, tokenizer, Scripted([(PROMPTS[0], whole)], "right"))
    (completion,) = engine.generate([PROMPTS[0]], params)
    assert completion.token_ids == whole.token_ids[: whole.token_ids.index(end) + 1]
    assert completion.finish_reason == "stop"
    assert_all_is_back(engine)


@pytest.mark.parametrize("place", range(1, 7))
def test_an_answer_ends_at_a_stop_string_inside_a_draft(dense, tokenizer, place):
    (whole,) = plainly(dense, tokenizer, [PROMPTS[2]], GREEDY)
    stop = tokenizer.decode(whole.token_ids[place : place + 2])
    params = GREEDY.with_changes(stop=[stop])
    (expected,) = plainly(dense, tokenizer, [PROMPTS[2]], params, batch_invariant=True)
    assert expected.finish_reason == "stop"
    engine = speculating(dense, tokenizer, Scripted([(PROMPTS[2], whole)], "right"), batch_invariant=True)
    assert engine.generate([PROMPTS[2]], params)[0] == expected
    assert_all_is_back(engine)


@pytest.mark.parametrize("settings", [slow({"temperature": 0}), {"seed": 5}])
def test_guesses_keep_to_a_grammar(dense, tokenizer, settings):
    params = SamplingParams(max_tokens=20, regex="[a-d]{4,9}(e|f)[0-9]{3}", **settings)
    expected = plainly(dense, tokenizer, PROMPTS, params, batch_invariant=True)
    for kind in ("right", "random"):
        proposer = Scripted(list(zip(PROMPTS, expected, strict=True)), kind)
        engine = speculating(dense, tokenizer, proposer, batch_invariant=True)
        assert engine.generate(PROMPTS, params) == expected
        assert proposer.right > 5
        assert_all_is_back(engine)


def test_parallel_answers_guess_each_for_itself(dense, tokenizer):
    params = SamplingParams(seed=1, n=4, max_tokens=20, ignore_eos=True)
    (expected,) = plainly(dense, tokenizer, [PROMPTS[2]], params, batch_invariant=True)
    texts = [(PROMPTS[2], each) for each in (expected, *expected.others)]
    engine = speculating(dense, tokenizer, Scripted(texts, "random"), batch_invariant=True)
    assert engine.generate([PROMPTS[2]], params) == [expected]
    assert_all_is_back(engine)


def test_an_answer_that_is_given_up_leaves_nothing(dense, tokenizer):
    engine = speculating(dense, tokenizer)
    stream = engine.stream(PROMPTS[2], GREEDY)
    for _ in range(3):
        next(stream)
    stream.close()
    assert_all_is_back(engine)
    assert not engine.core.strategy.proposer._texts


@pytest.mark.parametrize(("places", "waits"), [(1, True), (2, False)])
def test_who_guesses_knows_whether_others_wait_for_a_place(dense, tokenizer, places, waits):
    class Watching(Proposer):
        def __init__(self):
            self.seen = []

        def propose(self, answers):
            self.seen.append(self.crowded)
            return [Draft()] * len(answers)

    proposer = Watching()
    speculating(dense, tokenizer, proposer, max_num_seqs=places).generate(PROMPTS[:2], GREEDY)
    assert proposer.seen[1] == waits and not proposer.seen[-1]
