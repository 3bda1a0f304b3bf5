"""Rollouts are what the policy that is trained would say of them, whatever weights come in between."""

from __future__ import annotations

import pytest
import torch

from bessemer.core.errors import RequestError
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.inference.sampling.sampler import sample_rows, truncated_logits
from bessemer.inference.speculation.verification import verify
from bessemer.model.adapters import Adapter
from bessemer.model.cpu_kernels import library, unavailable
from bessemer.training.head import token_log_probs
from tests.cases import slow
from tests.inference.models import small_decoder, small_tokenizer
from tests.inference.test_rows import adjusted, random_logits, state
from tests.model.random_adapters import merge, random_adapter

PARAMS = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=24, seed=5)
#: One shorter than a block, and two that share more than one.
PROMPTS = [[7, 8, 9], list(range(40, 73)), [*range(40, 72), 99]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("rollouts"))


def engine_of(model, tokenizer, **settings):
    return Engine(model, tokenizer, config=EngineConfig(**{"block_size": 8, **settings}))


def trainer_log_probs(model, rollouts, temperature=0.7):
    """Of the tokens after the first, (R, T - 1), as the trainer computes them; 0 where nothing was made."""
    targets = rollouts.tokens[:, 1:].masked_fill(~rollouts.mask[:, 1:], -100)
    with torch.no_grad():
        hidden = model.hidden(rollouts.tokens)[:, :-1]
        found, _ = token_log_probs(hidden.flatten(0, 1), model.head_weight, targets.flatten(), temperature=temperature)
    return found.view_as(targets)


def nucleus_log_probs(model, rollouts, temperature=0.7, top_p=0.9):
    """By a softmax over the likeliest tokens that together reach `top_p`, of a plain forward pass."""
    with torch.no_grad():
        scaled = model.logits(model.hidden(rollouts.tokens))[:, :-1].float() / temperature
    falling, order = scaled.softmax(-1).sort(-1, descending=True)
    left_out = torch.zeros_like(scaled, dtype=torch.bool).scatter(-1, order, falling.cumsum(-1) - falling >= top_p)
    log_probs = scaled.masked_fill(left_out, -torch.inf).log_softmax(-1)
    return log_probs.gather(-1, rollouts.tokens[:, 1:, None])[..., 0].masked_fill(~rollouts.mask[:, 1:], 0.0)


def assert_close(log_probs, expected):
    assert (log_probs - expected).abs().max() < 1e-4


def at_step(engine, monkeypatch, number, act):
    """Call `act` once, after this many steps."""
    step = engine.core.step
    left = iter(range(number))

    def counted():
        step()
        if next(left, None) == number - 1:
            act()

    monkeypatch.setattr(engine.core, "step", counted)


# -- the tensors


def test_rows_are_prompt_completion_and_padding(tokenizer):
    engine = engine_of(small_decoder("dense"), tokenizer)
    found = engine.rollouts(PROMPTS, 3, PARAMS)
    rows = [one for prompt in PROMPTS for one in [prompt] * 3]
    assert found.tokens.shape == found.mask.shape == found.log_probs.shape == found.weight_version.shape
    assert found.tokens.shape == (9, found.lengths.max())
    assert [str(tensor.dtype)[6:] for tensor in (found.tokens, found.log_probs, found.weight_version, found.lengths)] == [
        "int64",
        "float32",
        "int32",
        "int64",
    ]
    assert found.prompt_lengths.tolist() == [len(row) for row in rows]
    for place, row in enumerate(rows):
        length = found.lengths[place]
        assert found.tokens[place, : len(row)].tolist() == row
        assert found.mask[place].nonzero().flatten().tolist() == list(range(len(row), length))
        assert found.finish_reasons[place] == ("length" if length == len(row) + 24 else "stop")
        assert not found.tokens[place, length:].any()
    assert (found.log_probs[found.mask] < 0).all() and not found.log_probs[~found.mask].any()
    assert len({tuple(row) for row in found.tokens.tolist()}) == 9
    # a prompt is read once, and what two have in common too
    assert engine.core.scheduler.asked_tokens == sum(map(len, PROMPTS)) and engine.core.scheduler.found_tokens == 32


def test_an_end_token_is_generated_and_ends_the_row(tokenizer):
    engine = engine_of(small_decoder("dense"), tokenizer)
    (end,) = engine.generate([[7]], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))[0].token_ids
    found = engine.rollouts([[7]], 1, SamplingParams(temperature=0, stop_token_ids=[end]))
    assert found.tokens.tolist() == [[7, end]] and found.mask.tolist() == [[False, True]]
    assert found.finish_reasons == ("stop",) and found.texts == ("",)


def test_a_seed_gives_the_same_rollouts_and_a_repeated_prompt_others(tokenizer):
    engine = engine_of(small_decoder("dense"), tokenizer)
    first = engine.rollouts([[7, 8]] * 2, 2, PARAMS)
    assert len({tuple(row) for row in first.tokens.tolist()}) == 4
    assert torch.equal(first.tokens, engine.rollouts([[7, 8]] * 2, 2, PARAMS).tokens)
    given = engine.rollouts([[7, 8]] * 2, 1, [PARAMS] * 2)
    assert torch.equal(given.tokens[0], given.tokens[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"best_of": 3}, "leave out best_of"), ({"beam_width": 2, "temperature": 1, "top_p": 1}, "beam_width")],
)
def test_what_is_no_sample_is_refused(tokenizer, changes, message):
    with pytest.raises(RequestError, match=message):
        engine_of(small_decoder("dense"), tokenizer).rollouts(PROMPTS, 2, PARAMS.with_changes(**changes))


# -- log-probabilities


@pytest.mark.parametrize("settings", [{}, {"cpu_kernels": "on"}, {"speculation": {"method": "ngram", "adapt": False}}], ids=str)
def test_log_probs_are_those_of_the_trainer(tokenizer, settings):
    if settings.get("cpu_kernels") and library() is None:
        pytest.skip(unavailable())
    model = small_decoder("dense")
    engine = engine_of(model, tokenizer, **settings)
    prompts = [[3, 4] * 12, *PROMPTS]
    params = PARAMS.with_changes(ignore_eos=True, max_tokens=40)
    tempered = engine.rollouts(prompts, 2, params)
    sampled = engine.rollouts(prompts, 2, params, logprobs_mode="sampled")
    assert torch.equal(tempered.tokens, sampled.tokens)
    assert_close(tempered.log_probs[:, 1:], trainer_log_probs(model, tempered))
    assert_close(sampled.log_probs[:, 1:], nucleus_log_probs(model, sampled))
    assert (sampled.log_probs - tempered.log_probs)[sampled.mask].max() > 0.05
    if "speculation" in settings:
        assert engine.statistics.draft_tokens_proposed > 0


SETTINGS = [
    {"temperature": 0.7},
    {"top_k": 5, "temperature": 1.3},
    {"top_k": 40, "top_p": 0.8},
    {"min_p": 0.02, "typical_p": 0.9},
    {"top_p": 0.9, "logit_bias": {3: 4.0}, "banned_tokens": [5], "repetition_penalty": 1.5},
]


@pytest.mark.parametrize("likeliest", [0, 3])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_modes_are_the_softmax_before_and_after_truncation(settings, likeliest):
    logits_RV = random_logits(2)
    both = [{"logprobs_mode": mode, "logprobs": likeliest, "seed": 3, **settings} for mode in ("temperature", "sampled")]
    found = sample_rows(logits_RV, [state(**one) for one in both])
    for mode, logits_V, (token, of_token) in zip(("temperature", "sampled"), logits_RV, found, strict=True):
        params = SamplingParams(**settings)
        changed_V = adjusted(logits_V, **settings)
        shaped_V = changed_V / params.temperature if mode == "temperature" else truncated_logits(changed_V[None], params)[0]
        expected_V = shaped_V.log_softmax(-1)
        assert abs(of_token.token - expected_V[token].item()) < 1e-5
        values, ids = expected_V.topk(likeliest)
        assert [id for id, _ in of_token.top] == ids.tolist()
        torch.testing.assert_close(torch.tensor([value for _, value in of_token.top]), values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["temperature", "sampled"])
def test_a_token_that_is_not_drawn_is_certain(mode):
    (found,) = sample_rows(random_logits(1), [state(temperature=0, logprobs=2, logprobs_mode=mode)])
    assert found.log_probs == (0.0, ((found.token, 0.0),))


@pytest.mark.parametrize("mode", ["temperature", "sampled"])
@pytest.mark.parametrize("changes", [{}, {"presence_penalty": 1.5}], ids=str)
@pytest.mark.parametrize("is_drawn", [False, True], ids=["n-gram", "draft model"])
def test_verified_tokens_have_the_log_probs_of_drawn_ones(mode, changes, is_drawn):
    settings = {"temperature": 0.8, "top_k": 30, "top_p": 0.95, **changes}
    logits_PV, seen = random_logits(4), 0
    for seed in range(12):
        row = state(seed=seed, logprobs=0, logprobs_mode=mode, **settings)
        draft = logits_PV[:3].topk(2).indices[:, seed % 2].tolist()
        made = verify(logits_PV, row, draft, logits_PV[:3].softmax(-1) if is_drawn else None)
        for place, (token, of_token) in enumerate(made):
            changed_V = adjusted_after(logits_PV[place], row.answer[:place], settings)
            shaped_V = changed_V / 0.8 if mode == "temperature" else truncated_logits(changed_V[None], row.params)[0]
            assert abs(of_token.token - shaped_V.log_softmax(-1)[token].item()) < 1e-5
            seen += 1
    assert seen > 12, "some draft tokens were accepted"


def adjusted_after(logits_V, answer, settings):
    changed = logits_V.clone()
    state(answer=answer, **settings).adjust(changed.numpy())
    return changed


# -- other weights


@pytest.mark.parametrize("settings", [{}, {"cpu_kernels": "on"}], ids=str)
def test_after_an_update_rollouts_are_those_of_a_new_engine(tokenizer, settings):
    if settings and library() is None:
        pytest.skip(unavailable())
    model, other = small_decoder("dense"), small_decoder("dense", seed=1)
    engine = engine_of(model, tokenizer, **settings)
    before = engine.rollouts(PROMPTS, 2, PARAMS)
    engine.update_weights(dict(other.named_parameters()))
    after = engine.rollouts(PROMPTS, 2, PARAMS)
    expected = engine_of(other, tokenizer, **settings).rollouts(PROMPTS, 2, PARAMS)
    assert torch.equal(after.tokens, expected.tokens) and torch.equal(after.log_probs, expected.log_probs)
    assert after.weight_version[after.mask].unique().tolist() == [1]
    assert before.weight_version.unique().tolist() == [0]
    assert after.tokens.shape != before.tokens.shape or not torch.equal(after.tokens, before.tokens)


@pytest.mark.parametrize("settings", [{}, {"speculation": {"method": "ngram", "adapt": False}}], ids=str)
def test_every_token_is_of_the_weights_of_its_version(tokenizer, monkeypatch, settings):
    models = [small_decoder("dense", seed=seed) for seed in range(2)]
    # the engine's own is changed
    engine = engine_of(small_decoder("dense"), tokenizer, **settings)
    at_step(engine, monkeypatch, 6, lambda: engine.update_weights(models[1].state_dict(), version=1))
    found = engine.rollouts([[3, 4] * 12, *PROMPTS], 2, PARAMS.with_changes(ignore_eos=True))
    assert found.weight_version[found.mask].unique().tolist() == [0, 1]
    # the prompt was read, and then again
    assert ((found.weight_version == 0) & found.mask).any(-1).all()
    expected = torch.stack([trainer_log_probs(model, found) for model in models])
    of_version = expected.gather(0, found.weight_version[None, :, 1:].long())[0]
    assert_close(found.log_probs[:, 1:], of_version)


def test_versions_count_updates_and_changes_in_place(tokenizer):
    model = small_decoder("dense")
    engine = engine_of(model, tokenizer)
    assert engine.weight_version == 0
    engine.update_weights()
    assert engine.weight_version == 1
    engine.update_weights(model.state_dict(), version=40)
    assert engine.weight_version == 40
    with torch.no_grad():
        model.norm.weight.mul_(2)
    assert engine.rollouts([[7]], 1, PARAMS).weight_version.max() == engine.weight_version == 41
    with pytest.raises(RequestError, match="no weight"):
        engine.update_weights({"no.such": torch.zeros(1)}, version=50)
    assert engine.weight_version == 41


@pytest.mark.parametrize("in_place", [False, slow(True)])
def test_after_an_update_magnitudes_are_of_the_new_weights(tokenizer, in_place):
    model, other = small_decoder("dense"), small_decoder("dense", seed=1)
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if name.endswith("proj.weight"):
                weight *= 3
    adapter = random_adapter(model, 3, magnitudes=True)
    engine = engine_of(model, tokenizer)
    engine.load_adapter("norms", adapter)
    prepared = engine.prepare(PROMPTS[1], PARAMS, adapter="norms")
    # the name has another adapter, and the request keeps its own
    engine.load_adapter("norms", random_adapter(model, 4, magnitudes=True))
    engine.load_adapter("again", adapter)
    engine.generate([PROMPTS[1]], PARAMS, adapter="again")
    if in_place:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(other.get_parameter(name))
    else:
        engine.update_weights(other.state_dict())
    expected = engine_of(merge(other, adapter), tokenizer).generate([PROMPTS[1]], PARAMS)[0].token_ids
    assert engine.generate([PROMPTS[1]], PARAMS, adapter="again")[0].token_ids == expected
    engine.begin(prepared)
    while not prepared.done:
        engine.step()
    assert prepared.token_ids == expected


# -- other adapters


def adapted_engine(tokenizer, **settings):
    model = small_decoder("dense")
    engine = engine_of(model, tokenizer, **settings)
    adapters = [random_adapter(model, seed) for seed in range(3)]
    engine.load_adapter("trained", adapters[0])
    engine.load_adapter("other", adapters[2])
    return engine, adapters


# after the first step a prompt waits for the blocks that another one has computed of it
@pytest.mark.parametrize(("steps", "settings"), [(1, {}), (6, {}), (6, {"cpu_kernels": "on"})], ids=str)
def test_every_token_is_of_the_adapter_of_its_version(tokenizer, monkeypatch, steps, settings):
    if settings and library() is None:
        pytest.skip(unavailable())
    engine, adapters = adapted_engine(tokenizer, **settings)
    at_step(engine, monkeypatch, steps, lambda: engine.update_adapter("trained", adapters[1]))
    found = engine.rollouts(PROMPTS, 2, PARAMS.with_changes(ignore_eos=True), adapter="trained")
    merged = [merge(small_decoder("dense"), adapter) for adapter in adapters[:2]]
    expected = torch.stack([trainer_log_probs(model, found) for model in merged])
    assert found.weight_version[found.mask].unique().tolist() == [0, 1]
    assert_close(found.log_probs[:, 1:], expected.gather(0, found.weight_version[None, :, 1:].long())[0])


def test_an_updated_adapter_finds_no_blocks_and_the_others_find_theirs(tokenizer):
    engine, adapters = adapted_engine(tokenizer)
    params, names = PARAMS.with_changes(max_tokens=4), ("trained", "other", None)
    for name in names:
        engine.generate([PROMPTS[1]], params, adapter=name)
    trained = {name: weight.clone() for name, weight in engine.model.named_parameters()}
    engine.update_adapter("trained", adapters[1], version=9)
    again = [engine.generate([PROMPTS[1]], params, adapter=name)[0] for name in names]
    assert [one.cached_tokens for one in again] == [0, 32, 32]
    assert engine.weight_version == 9
    fresh, _ = adapted_engine(tokenizer)
    fresh.load_adapter("trained", adapters[1])
    assert again[0].token_ids == fresh.generate([PROMPTS[1]], params, adapter="trained")[0].token_ids
    assert all(torch.equal(weight, trained[name]) for name, weight in engine.model.named_parameters())


def test_an_update_goes_past_other_requests_in_flight(tokenizer):
    engine, adapters = adapted_engine(tokenizer)
    params = PARAMS.with_changes(temperature=0, ignore_eos=True)
    expected = [engine.generate([PROMPTS[0]], params, adapter=name)[0].token_ids for name in ("other", None)]
    streams = [engine.stream(PROMPTS[0], params, adapter=name) for name in ("other", None)]
    begun = [next(stream) for stream in streams]
    engine.update_adapter("trained", adapters[1])
    assert engine.core.scheduler.preemptions == 0
    for first, stream, tokens in zip(begun, streams, expected, strict=True):
        assert [token for chunk in (first, *stream) for token in chunk.token_ids] == tokens


def test_a_request_that_was_prepared_before_an_update_begins_with_it(tokenizer):
    engine, adapters = adapted_engine(tokenizer)
    # blocks of the adapter as it was
    engine.generate([PROMPTS[1]], PARAMS, adapter="trained")
    request = engine.prepare(PROMPTS[1], PARAMS, adapter="trained")
    engine.update_adapter("trained", adapters[1])
    engine.update_adapter("trained", adapters[2])
    engine.begin(request)
    while not request.done:
        engine.step()
    assert request.token_ids == engine.generate([PROMPTS[1]], PARAMS, adapter="other")[0].token_ids


def test_an_adapter_in_memory_is_copied(tokenizer):
    engine, adapters = adapted_engine(tokenizer)
    before = engine.generate([PROMPTS[0]], PARAMS, adapter="trained")
    for down_RK, *_ in adapters[0].updates.values():
        down_RK.zero_()
    assert engine.generate([PROMPTS[0]], PARAMS, adapter="trained") == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda updates: {"layers.9.self_attn.q_proj": next(iter(updates.values()))},
            "'layers.9.self_attn.q_proj', which is no",
        ),
        (lambda updates: {"embed_tokens": next(iter(updates.values()))}, "'embed_tokens', which is no"),
        (lambda updates: {name: one._replace(up_NR=one.up_NR[:, 1:]) for name, one in updates.items()}, "has shapes"),
        (lambda updates: {}, "no update of any layer"),
    ],
)
def test_an_adapter_that_does_not_fit_changes_nothing(tokenizer, change, message):
    engine, adapters = adapted_engine(tokenizer)
    before = engine.generate([PROMPTS[1]], PARAMS, adapter="trained")[0]
    with pytest.raises(RequestError, match=message):
        engine.update_adapter("trained", Adapter(change(adapters[1].updates)))
    with pytest.raises(RequestError, match="unknown adapter 'trainde'"):
        engine.update_adapter("trainde", adapters[1])
    after = engine.generate([PROMPTS[1]], PARAMS, adapter="trained")[0]
    assert (after.token_ids, after.cached_tokens, engine.weight_version) == (before.token_ids, 32, 0)
