"""What is captured beside what the decoder's own modules compute."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from bessemer.core.errors import RequestError
from bessemer.inference.engine import Capture, Engine, EngineConfig, SamplingParams
from bessemer.inference.execution.backend import Observed
from bessemer.inference.execution.kv_cache import block_bytes, layer_groups
from bessemer.model.cpu_kernels import library
from bessemer.model.layers.attention_backends import attention_weights
from tests.cases import slow_but
from tests.inference.models import ARCHITECTURES, small_decoder, small_tokenizer
from tests.model.randomised import random_tokens

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("capture"))


def hooked(decoder, tokens):
    """By hooks on the modules: the states before each layer and after the last, the choices of experts."""
    states, routings, hooks = {}, {}, []
    for layer, block in enumerate(decoder.blocks):
        hooks.append(block.register_forward_pre_hook(lambda _, given, layer=layer: states.__setitem__(layer, given[0][0])))
        if decoder.config.is_sparse(layer):
            router = block.mlp.router
            hooks.append(router.register_forward_hook(lambda _, given, out, layer=layer: routings.__setitem__(layer, out)))
    last = len(decoder.blocks) - 1
    hooks.append(decoder.blocks[last].register_forward_hook(lambda _, given, out: states.__setitem__(last + 1, out[0])))
    with torch.no_grad():
        decoder(torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    return states, routings


def attended(decoder, tokens, monkeypatch):
    """The attention weights of every layer, (H, T, T), of a decoder that computes them explicitly without a cache."""
    found = []

    def backend(query, key, value, mask, scores):
        weights = attention_weights(query, key, mask, scores)
        found.append(weights[0].float())
        return weights.to(value.dtype) @ value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)

    layers = [layer for layer, block in enumerate(decoder.blocks) if not block.variant.recurrent]
    with monkeypatch.context() as patch, torch.no_grad():
        for layer in layers:
            patch.setattr(decoder.blocks[layer].self_attn, "backend", backend)
        decoder(torch.tensor([tokens]))
    return dict(zip(layers, found, strict=True))


def everything(config):
    """All there is of a model."""
    layers = range(config.num_hidden_layers)
    return Capture(
        states=tuple(range(config.num_hidden_layers + 1)),
        attention=tuple((layer, head) for layer in layers if config.types[layer] != "linear_attention" for head in (0, 3)),
        routing=tuple(layer for layer in layers if config.is_sparse(layer)),
    )


def check(decoder, tokens, captured, monkeypatch):
    """Compare what was captured of all but the last of some tokens with the modules."""
    states, routings = hooked(decoder, tokens)
    weights = attended(decoder, tokens, monkeypatch)
    assert captured.positions == list(range(len(tokens) - 1))
    count = len(captured.positions)
    for layer, found in captured.states.items():
        expected = states[layer][:count]
        assert (found - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
    for (layer, head), found in captured.attention.items():
        assert (found - weights[layer][head, :count, :count]).abs().max() < 1e-5
    for layer, found in captured.experts.items():
        assert torch.equal(found, routings[layer].experts_Nk[:count])
        assert (captured.expert_weights[layer] - routings[layer].weights_Nk[:count]).abs().max() < 1e-5


#: Ways to compute the same: the model's modules, or compiled kernels where they know it; a step that holds little; memory that
#: does not hold all requests.
WAYS = {
    "modules": EngineConfig(cpu_kernels="off", block_size=8),
    "kernels": EngineConfig(cpu_kernels="on", block_size=8),
    "chunked": EngineConfig(cpu_kernels="off", block_size=8, max_num_batched_tokens=12, max_num_seqs=4),
    "invariant": EngineConfig(cpu_kernels="off", block_size=8, batch_invariant=True),
}


#: Every architecture once, every way at least once.
USUAL = {(name, list(WAYS)[number % len(WAYS)]) for number, name in enumerate(ARCHITECTURES)}


@pytest.mark.parametrize(("name", "way"), slow_but(USUAL, product(ARCHITECTURES, WAYS)))
def test_what_is_captured_equals_hooks_on_the_modules(name, way, tokenizer, monkeypatch):
    if way == "kernels" and library() is None:
        pytest.skip("no compiler")
    decoder = small_decoder(name)
    if name == "linear":
        # its states step by step and in chunks differ by more in float32
        decoder.double()
    engine = Engine(decoder, tokenizer, config=WAYS[way])
    prompts = [row[:length].tolist() for row, length in zip(random_tokens(decoder.config, 3, 40), (40, 25, 9), strict=True)]
    capture = everything(decoder.config)
    requests = [engine.prepare(prompt, GREEDY, capture=capture) for prompt in prompts[:2]]
    requests.append(engine.prepare(prompts[2], GREEDY))
    for request in requests:
        engine.begin(request)
    while not all(request.done for request in requests):
        engine.step()
    for request in requests[:2]:
        check(decoder, request.sequence.tokens, request.captured, monkeypatch)
    assert requests[2].captured is None


@pytest.mark.parametrize("name", ["dense", "windows", "experts"])
def test_what_is_computed_again_after_a_preemption_is_kept_once(name, tokenizer, monkeypatch):
    decoder = small_decoder(name)
    config = EngineConfig(cpu_kernels="off", block_size=4, max_num_seqs=4)
    each = sum(block_bytes(decoder.config, group, 4, torch.float32) for group in layer_groups(decoder.config))
    engine = Engine(decoder, tokenizer, config=config.with_changes(kv_memory=14 * each / 2**30))
    prompts = [row.tolist() for row in random_tokens(decoder.config, 4, 16)]
    capture = everything(decoder.config)
    completions = engine.generate(prompts, GREEDY, capture=capture)
    assert engine.core.scheduler.preemptions
    for prompt, completion in zip(prompts, completions, strict=True):
        check(decoder, prompt + completion.token_ids, completion.captured, monkeypatch)


def test_drafts_that_were_rejected_leave_nothing(tokenizer, monkeypatch):
    decoder = small_decoder("dense")
    config = EngineConfig(cpu_kernels="off", block_size=8, speculation={"method": "ngram", "tokens": 4, "adapt": False})
    engine = Engine(decoder, tokenizer, config=config)
    prompt = random_tokens(decoder.config, 1, 6)[0].tolist() * 3
    (completion,) = engine.generate([prompt], GREEDY, capture=everything(decoder.config))
    assert engine.statistics.draft_tokens_proposed > engine.statistics.draft_tokens_accepted
    check(decoder, prompt + completion.token_ids, completion.captured, monkeypatch)


@pytest.mark.parametrize(
    ("positions", "expected"),
    [("prompt", list(range(20))), ("last", [19]), ("generated", list(range(20, 31))), ((3, 21, 90), [3, 21])],
)
def test_positions_are_chosen(positions, expected, tokenizer):
    decoder = small_decoder("dense")
    engine = Engine(decoder, tokenizer)
    prompt = random_tokens(decoder.config, 1, 20)[0].tolist()
    (completion,) = engine.generate([prompt], GREEDY, capture=Capture(states=(1,), positions=positions))
    assert completion.captured.positions == expected
    states, _ = hooked(decoder, prompt + completion.token_ids)
    assert (completion.captured.states[1] - states[1][expected]).abs().max() < 1e-5


def test_only_what_is_captured_is_computed_although_it_is_cached(tokenizer):
    decoder = small_decoder("dense")
    engine = Engine(decoder, tokenizer, config=EngineConfig(block_size=8))
    prompt = random_tokens(decoder.config, 1, 40)[0].tolist()
    engine.generate([prompt], GREEDY)
    for positions, computed in (("last", 8), ((17,), 24), ("all", 40)):
        before = engine.statistics.computed_tokens
        engine.capture([prompt], Capture(states=(0,), positions=positions))
        assert engine.statistics.computed_tokens - before == computed


def test_a_request_that_captures_changes_no_token_and_a_prompt_alone_needs_no_logits(tokenizer, monkeypatch):
    decoder = small_decoder("experts")
    engine = Engine(decoder, tokenizer)
    prompts = [row.tolist() for row in random_tokens(decoder.config, 3, 30)]
    capture = everything(decoder.config)
    assert engine.generate(prompts, GREEDY, capture=capture) == engine.generate(prompts, GREEDY)
    wanted = []
    forward = engine.core.runner.forward
    monkeypatch.setattr(engine.core.runner, "forward", lambda batch: (wanted.append(len(batch.wanted)), forward(batch))[1])
    found = engine.capture(prompts, capture)
    assert set(wanted) == {0}
    monkeypatch.undo()
    for prompt, captured in zip(prompts, found, strict=True):
        check(decoder, [*prompt, 0], captured, monkeypatch)


def test_a_layer_by_the_compiled_step_and_one_by_modules_for_an_adapter(tokenizer):
    whole = Observed({1: torch.tensor([[1.0], [3.0]])})
    modules = Observed({1: torch.tensor([[2.0]]), 2: torch.tensor([[5.0]])})
    merged = whole.interleaved(modules, {1: [0, 4, 9], 2: [4]}, own={0, 9})
    assert merged.states[1].tolist() == [[1.0], [2.0], [3.0]]
    assert merged.states[2].tolist() == [[5.0]]


def test_embeddings_are_pooled_states(tokenizer):
    decoder = small_decoder("dense")
    engine = Engine(decoder, tokenizer)
    prompts = [row[:length].tolist() for row, length in zip(random_tokens(decoder.config, 2, 30), (30, 7), strict=True)]
    with torch.no_grad():
        hidden = [decoder.hidden(torch.tensor([prompt]))[0] for prompt in prompts]
    means = torch.stack([states.mean(0) for states in hidden])
    assert torch.allclose(engine.embed(prompts), means / means.norm(dim=-1, keepdim=True), atol=1e-5)
    lasts = torch.stack([states[-1] for states in hidden])
    assert torch.allclose(engine.embed(prompts, pooling="last", normalise=False), lasts, atol=1e-5)
    first = torch.stack([decoder.embed_tokens(torch.tensor(prompt)).mean(0) for prompt in prompts])
    assert torch.allclose(engine.embed(prompts, layer=0, normalise=False), first, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "capture", "message"),
    [
        ("dense", Capture(states=(3,)), "before layer 0 … 1"),
        ("dense", Capture(attention=((0, 4),)), r"\(0, 4\) is not"),
        ("dense", Capture(routing=(0,)), "no experts"),
        ("linear", Capture(attention=((0, 0),)), "linear attention"),
        ("dense", Capture(states=(0,), positions=(-1,)), "counted from 0"),
        ("dense", Capture(states=(0,), positions=()), "at least one position"),
    ],
)
def test_what_a_model_does_not_have_is_refused(name, capture, message, tokenizer):
    engine = Engine(small_decoder(name), tokenizer)
    with pytest.raises(RequestError, match=message):
        engine.capture([[1, 2]], capture)


@pytest.mark.parametrize("changes", [{"n": 2}, {"beam_width": 2}])
def test_one_completion_is_captured(changes, tokenizer):
    engine = Engine(small_decoder("dense"), tokenizer)
    with pytest.raises(RequestError, match="one completion"):
        engine.generate([[1, 2]], SamplingParams(max_tokens=2, **changes), capture=Capture(states=(0,)))
