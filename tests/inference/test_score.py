"""Scores of continuations are the log-probabilities of a plain forward pass, however they are computed."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from bessemer.core.errors import RequestError
from bessemer.inference import build
from bessemer.inference.config import EngineConfig
from bessemer.inference.engine import Engine, SamplingParams
from bessemer.inference.execution.kv_cache import block_bytes, layer_groups
from bessemer.inference.offline import TextScorer
from bessemer.inference.scores import Score
from bessemer.model.adapters.folder import write_adapter
from bessemer.model.cpu_kernels import library, unavailable
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.quantise import quantise
from tests.cases import slow, slow_but
from tests.inference.models import ARCHITECTURES, BASE, small_decoder, small_tokenizer
from tests.model.random_adapters import merge, random_adapter
from tests.model.randomised import random_decoder

BLOCK = 8
CONTEXT = BASE.max_position_embeddings
#: Prefixes of one to a hundred tokens, two of which begin alike, with continuations of one to twenty.
ITEMS = [
    ([7], [[3], [5, 6]]),
    (list(range(100)), [[4, 4, 4], [9], [8] * 20, [1, 2]]),
    ([*range(90), 3, 2, 1], [[60, 61, 62, 63]]),
    ([9] * 21, [[200] * 3, [201] * 9]),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("scores"))


@pytest.fixture(scope="module")
def dense():
    return small_decoder("dense")


def engine_of(model, tokenizer, **settings):
    return Engine(model, tokenizer, config=EngineConfig(**{"block_size": BLOCK, **settings}))


@torch.no_grad()
def forward(model, tokens):
    """Log-probabilities of the token after each, in one pass."""
    return model(torch.tensor([tokens]))[0].log_softmax(-1)


def assert_are_those_of(log_probs_of, items, found):
    """log_probs_of: for tokens, log-probabilities of the one after each, (N, V)."""
    for (prefix, continuations), scores in zip(items, found, strict=True):
        assert [score.token_ids for score in scores] == continuations
        for score in scores:
            log_probs_TV = log_probs_of(prefix + score.token_ids[:-1])[len(prefix) - 1 :]
            expected = log_probs_TV.gather(-1, torch.tensor(score.token_ids)[:, None])[:, 0]
            assert (torch.tensor(score.log_probs) - expected).abs().max() < 1e-4
            assert score.greedy == (log_probs_TV.argmax(-1) == torch.tensor(score.token_ids)).tolist()
            assert score.total == pytest.approx(expected.sum().item(), abs=1e-3)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_are_those_of_a_forward_pass(name, tokenizer):
    model = small_decoder(name)
    assert_are_those_of(partial(forward, model), ITEMS, engine_of(model, tokenizer).score_items(ITEMS))


def test_a_continuation_is_greedy_where_greedy_decoding_writes_it(dense, tokenizer):
    engine, prefix = engine_of(dense, tokenizer), ITEMS[1][0]
    (made,) = engine.generate([prefix], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
    parted = [*made.token_ids[:4], (made.token_ids[4] + 1) % 250, made.token_ids[5]]
    greedy, other = engine.score(prefix, [made.token_ids, parted])
    assert greedy.is_greedy and greedy.greedy == [True] * 6
    assert not other.is_greedy and other.greedy[:5] == [True] * 4 + [False]


# -- the prefix is shared


@pytest.mark.parametrize("max_num_seqs", [1, 3, 64])
@pytest.mark.parametrize("name", ["dense", "windows", "latent"])
def test_a_prefix_is_computed_once_and_the_last_token_of_a_continuation_never(name, max_num_seqs, tokenizer):
    engine = engine_of(small_decoder(name), tokenizer, max_num_seqs=max_num_seqs, prefix_cache=False)
    engine.score(list(range(45)), [[3], [1, 2], [6, 7, 8], [5], [9] * 6])
    assert engine.statistics.computed_tokens == 45 + 0 + 1 + 2 + 0 + 5


def test_a_continuation_behind_a_state_reads_less_than_a_block_of_the_prefix_again(tokenizer):
    engine = engine_of(small_decoder("linear"), tokenizer)
    engine.score(list(range(45)), [[3], [1, 2], [6, 7, 8], [9] * 6])
    assert engine.statistics.computed_tokens == 45 + (1 + 2 + 5) + 3 * (45 % BLOCK)


def test_one_token_continuations_take_no_step_of_their_own(dense, tokenizer):
    engine = engine_of(dense, tokenizer)
    engine.score([1, 2, 3], [[token] for token in range(200)])
    assert (engine.statistics.steps, engine.statistics.computed_tokens) == (1, 3)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("name", ["dense", "linear"])
def test_the_second_of_two_items_reads_at_most_a_block_of_their_examples_again(name, together, tokenizer):
    model = random_decoder(BASE.with_changes(**ARCHITECTURES[name], max_position_embeddings=1200))
    engine = engine_of(model, tokenizer, max_num_batched_tokens=300)
    examples = [(token * 37) % 250 for token in range(1003)]
    items = [([*examples, 251, 252], [[1, 2]]), ([*examples, 253], [[5, 6, 7]])]
    scores = [engine.score_items(part) for part in ([items] if together else [[item] for item in items])]
    assert engine.statistics.computed_tokens <= 1005 + 1 + (BLOCK + 1 + 2)
    first, second = (score for part in scores for (score,) in part)
    assert (first.cached_tokens, second.cached_tokens) == (0, 1000)


# -- however they are computed


@pytest.mark.parametrize("name", slow_but(["dense", "windows", "linear"], ARCHITECTURES))
def test_tokens_that_are_cached_already_are_scored_again(name, tokenizer):
    model = small_decoder(name)
    engine = engine_of(model, tokenizer)
    items = [([9] * 21, [[9] * 40]), ([9] * 21, [[9] * 30, [9] * 30])]
    for _ in range(2):
        assert_are_those_of(partial(forward, model), items, engine.score_items(items))
    assert engine.score([9] * 21, [[9] * 40])[0].cached_tokens == 16


def with_blocks(model, tokenizer, blocks):
    size = sum(block_bytes(model.config, group, BLOCK, torch.float32) for group in layer_groups(model.config))
    return engine_of(model, tokenizer, kv_memory=(blocks + 0.5) * size / 2**30)


def test_what_is_preempted_is_scored_once(dense, tokenizer):
    engine = with_blocks(dense, tokenizer, 21)
    items = [([seed] * 30, [[seed, 1] * 20, [seed, 2] * 25, [seed, 3] * 30]) for seed in range(3)]
    found = engine.score_items(items)
    assert engine.core.scheduler.preemptions
    assert_are_those_of(partial(forward, dense), items, found)


@pytest.mark.parametrize("name", slow_but(["windows", "linear"], ARCHITECTURES))
@pytest.mark.parametrize(
    "settings",
    [{"max_num_seqs": 2, "max_num_batched_tokens": 11}, slow({"batch_invariant": True})],
    ids=["chunks", "invariant"],
)
def test_scores_in_small_chunks_and_in_fixed_ones(name, settings, tokenizer):
    model = small_decoder(name)
    assert_are_those_of(partial(forward, model), ITEMS, engine_of(model, tokenizer, **settings).score_items(ITEMS))


def test_an_invariant_engine_scores_a_completion_as_it_sampled_it_to_the_bit(dense, tokenizer):
    engine = engine_of(dense, tokenizer, batch_invariant=True)
    prefix = list(range(45))
    params = SamplingParams(seed=3, n=3, max_tokens=9, logprobs=0, ignore_eos=True)
    (first,) = engine.generate([prefix], params)
    completions = [first, *first.others]
    scores = engine_of(dense, tokenizer, batch_invariant=True).score(prefix, [each.token_ids for each in completions])
    assert [score.log_probs for score in scores] == [[one.log_probs.token for one in each.log_probs] for each in completions]


def test_a_long_continuation_never_wants_more_logits_of_a_step_than_there_may_be(dense, tokenizer, monkeypatch):
    monkeypatch.setattr(build, "MOST_LOGITS", 6 * BASE.vocab_size)
    engine = engine_of(dense, tokenizer)
    rows = []
    compute = engine.core.runner.forward
    monkeypatch.setattr(engine.core.runner, "forward", lambda batch: rows.append(len(batch.wanted)) or compute(batch))
    items = [([1, 2, 3], [[5, 6] * 30]), ([4] * 20, [[7, 8] * 10, [9] * 30])]
    assert_are_those_of(partial(forward, dense), items, engine.score_items(items))
    # beside those of tokens read one by one
    assert 6 <= max(rows) <= 6 + 2


def test_a_continuation_may_end_a_token_behind_the_context(dense, tokenizer):
    engine = engine_of(dense, tokenizer)
    prefix, continuation = [3] * 50, [4, 5] * ((CONTEXT - 50) // 2) + [6]
    items = [(prefix, [continuation])]
    assert_are_those_of(partial(forward, dense), items, engine.score_items(items))
    with pytest.raises(RequestError, match=f"{CONTEXT + 2} tokens, of which all but the last are read, .* is {CONTEXT}"):
        engine.score(prefix, [[1], [*continuation, 7]])


@pytest.mark.skipif(library() is None, reason=str(unavailable()))
def test_scores_by_quantised_kernels_are_of_their_own_logits(tokenizer):
    model = random_decoder(BASE.with_changes(hidden_size=64, head_dim=16))
    quantise(model, QuantizeConfig(scheme="int8", group_size=32))
    settings = EngineConfig(block_size=BLOCK, cpu_kernels="on")
    scorer = TextScorer(model, CONTEXT, settings)
    engine = Engine(model, tokenizer, config=settings)
    assert engine.arithmetic == f"computed by {scorer.arithmetic}" and "activations of 8 bits" in engine.arithmetic
    found = engine.score_items(ITEMS)
    assert_are_those_of(lambda tokens: torch.cat(list(scorer.logits(tokens))).log_softmax(-1), ITEMS, found)


def test_each_item_may_have_an_adapter(dense, tokenizer, tmp_path):
    adapter = random_adapter(dense, 1)
    write_adapter(adapter, dense, tmp_path / "one")
    engine = engine_of(dense, tokenizer)
    engine.load_adapter("one", tmp_path / "one")
    plain, adapted = engine.score_items([ITEMS[1], ITEMS[1]], adapter=[None, "one"])
    assert_are_those_of(partial(forward, dense), ITEMS[1:2], [plain])
    assert_are_those_of(partial(forward, merge(copy.deepcopy(dense), adapter)), ITEMS[1:2], [adapted])


# prepared; while the prefix is read; when the first tokens are scored and some continuations wait, or all
@pytest.mark.parametrize(("steps", "max_num_seqs"), [(None, 8), (1, 8), (4, 2), (4, 1)])
def test_an_adapter_may_be_updated_under_scores_that_use_it(steps, max_num_seqs, dense, tokenizer):
    prefix, continuations = list(range(100)), [[4, 4, 4, 5], [9, 1, 2], [8] * 20, [1, 2]]
    adapters = [random_adapter(dense, seed) for seed in (1, 2)]
    engine = engine_of(dense, tokenizer, max_num_batched_tokens=32, max_num_seqs=max_num_seqs)
    engine.load_adapter("trained", adapters[0])
    # blocks of the adapter as it was, which nothing may find after the update
    engine.score(prefix, continuations, adapter="trained")
    engine.load_adapter("trained", adapters[0])
    request, _ = engine._builder.score_request((prefix, continuations), 0, engine._adapters.find("trained"), None)
    if steps is not None:
        engine.begin(request)
        for _ in range(steps):
            engine.step()
    known = [len(each.log_probs) for each in request._partial]
    assert (max(known) > 0) == (steps == 4)
    engine.update_adapter("trained", adapters[1])
    if steps is None:
        engine.begin(request)
    while not request.done:
        engine.step()
    old, new = ([score.log_probs for score in expected_scores(dense, one, prefix, continuations)] for one in adapters)
    for score, count, before, after in zip(request.scores(), known, old, new, strict=True):
        expected = torch.tensor(before[:count] + after[count:])
        assert (torch.tensor(score.log_probs) - expected).abs().max() < 1e-4
    assert not engine.core.busy and not engine.core.scheduler.has_work
    assert all(pool.free == pool.total for pool, _ in engine.core.scheduler.groups)
    again = engine.score(prefix, continuations, adapter="trained")
    assert (torch.tensor(again[2].log_probs) - torch.tensor(new[2])).abs().max() < 1e-4


def expected_scores(model, adapter, prefix, continuations):
    merged = merge(copy.deepcopy(model), adapter)
    for tokens in continuations:
        log_probs_TV = forward(merged, prefix + tokens[:-1])[len(prefix) - 1 :]
        values = log_probs_TV.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        yield Score(tokens, values.tolist(), [])


def test_scores_beside_completions_change_neither(dense, tokenizer):
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    settings = {"speculation": {"method": "ngram", "tokens": 3}}
    (alone,) = engine_of(dense, tokenizer, **settings).generate([[5, 6] * 8], params)
    engine = engine_of(dense, tokenizer, **settings)
    stream = engine.stream([5, 6] * 8, params)
    chunks = [next(stream)]
    assert_are_those_of(partial(forward, dense), ITEMS, engine.score_items(ITEMS))
    assert [id for chunk in (*chunks, *stream) for id in chunk.token_ids] == alone.token_ids


# -- texts


def test_texts_are_encoded_as_one_and_an_empty_prefix_is_the_begin_token(dense, tokenizer):
    engine = engine_of(dense, tokenizer)
    begin, encode = [tokenizer.bos_id], partial(tokenizer.encode, add_bos=False)
    assert engine.score("x ", ["a", "bc"]) == engine.score([*begin, *encode("x")], [encode(" a"), encode(" bc")])
    assert engine.score("", ["in a"]) == engine.score([], [encode("in a")]) == engine.score(begin, [encode("in a")])
    assert engine.score([5], ["in a"]) == engine.score([5], [encode("in a")])


# -- errors


@pytest.mark.parametrize(
    ("prefix", "continuations", "message"),
    [
        ([1], [], "at least one"),
        ("a", "b", "a list of continuations"),
        ([1], [[2], []], "continuation 1 has no tokens of its own"),
        ("t", ["h"], "continuation 0 has no tokens of its own"),
        ([1], [[2], [3, 263]], "continuation 1 has a token id outside the vocabulary"),
        ([-1], [[2]], "the prefix has a token id outside the vocabulary"),
        ([1] * CONTEXT, [[2, 3]], "shorten them"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_anything_is_computed(prefix, continuations, message, dense, tokenizer):
    engine = engine_of(dense, tokenizer)
    with pytest.raises(RequestError, match=message):
        engine.score_items([([1], [[2]]), (prefix, continuations)])
    assert engine.statistics.steps == 0


@pytest.mark.parametrize(("items", "message"), [(("the", ["n"]), "is a pair"), ([([1], [2, 3])], "a list of continuations")])
def test_items_that_lack_a_level_are_refused(items, message, dense, tokenizer):
    with pytest.raises(RequestError, match=message):
        engine_of(dense, tokenizer).score_items(items)


def test_an_item_that_never_fits_in_the_memory_is_refused(dense, tokenizer):
    engine = with_blocks(dense, tokenizer, CONTEXT // BLOCK - 1)
    with pytest.raises(RequestError, match="the memory for keys and values holds"):
        engine.score([1] * (CONTEXT - BLOCK), [[2], [3] * 2])


def test_a_step_that_fails_ends_the_items_and_frees_their_blocks(dense, tokenizer, monkeypatch):
    engine = engine_of(dense, tokenizer, max_num_seqs=2)
    compute = engine.core.runner.forward

    def fail(batch):
        if engine.statistics.steps == 2:
            raise RequestError("no luck")
        return compute(batch)

    with monkeypatch.context() as patched:
        patched.setattr(engine.core.runner, "forward", fail)
        with pytest.raises(RequestError, match="no luck"):
            engine.score_items(ITEMS)
    assert not engine.core.busy and not engine.core.scheduler.has_work
    assert all(pool.free == pool.total for pool, _ in engine.core.scheduler.groups)
    assert_are_those_of(partial(forward, dense), ITEMS, engine.score_items(ITEMS))


def test_logits_that_are_not_finite_are_an_error(tokenizer):
    model = small_decoder("dense")
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    with pytest.raises(RequestError, match="not finite"):
        engine_of(model, tokenizer).score([1, 2], [[3, 4], [5]])
