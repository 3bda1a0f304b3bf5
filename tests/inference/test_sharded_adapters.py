"""Adapters of a model that several processes share say what they say in one."""

from __future__ import annotations

import gc

import pytest
import torch

from bessemer.core.errors import ArtefactError, RequestError
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.inference.execution.batch import Batch
from bessemer.inference.execution.tensor_parallel.sharded_model import Command, decode, encode
from bessemer.inference.execution.weights import AdapterNumbers
from bessemer.model.adapters import Adapter
from bessemer.model.adapters.folder import write_adapter
from tests.cases import slow
from tests.distributed.pool import pool_of
from tests.inference.models import small_tokenizer
from tests.inference.sharded import decoder, shared
from tests.model.random_adapters import random_adapter

PARAMS = SamplingParams(temperature=0, max_tokens=6, logprobs=1, ignore_eos=True)
PROMPTS = [[7], list(range(40, 73)), [9] * 20]
ADAPTERS = ["one", None, "two"]
SHARED_EXPERT = {"shared_expert_intermediate_size": 16, "shared_expert_gate": True}

two, four = pool_of(2, "module"), pool_of(4, "module")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("sharded"))


def answers(engine, name, changes, place):
    """With two adapters beside each other; with one that came anew, in the middle of an answer too; and after one has gone."""
    model = decoder(name, changes)
    engine.load_adapter("one", place / "one")
    engine.load_adapter("two", random_adapter(model, 2, rank=5, endings=("q_proj", "o_proj", "down_proj")))
    beside = engine.generate(PROMPTS, PARAMS, adapter=ADAPTERS)
    stream = engine.stream(PROMPTS[1], PARAMS, adapter="one")
    begun = [next(stream), next(stream)]
    engine.update_adapter("one", random_adapter(model, 3))
    chunks = [*begun, *stream]
    after = engine.generate(PROMPTS, PARAMS, adapter=["one", "one", "two"])
    engine.unload_adapter("two")
    with pytest.raises(RequestError, match="unknown adapter 'two'; loaded: one"):
        engine.generate(PROMPTS, PARAMS, adapter="two")
    with pytest.raises(ArtefactError, match="trained on a model with other weights"):
        engine.load_adapter("other", place / "other")
    found = [*beside, *after, *engine.generate(PROMPTS, PARAMS, adapter="one")]
    streamed = [one.log_probs.token for chunk in chunks for one in chunk.log_probs]
    return [token for chunk in chunks for token in chunk.token_ids], streamed, found


def compare(pool, tokenizer, place, name, parallel, changes=None, settings=None):
    model, other = decoder(name, changes), decoder(name, changes)
    write_adapter(random_adapter(model, 1), model, place / "one")
    with torch.no_grad():
        other.norm.weight += 0.1
    write_adapter(random_adapter(other, 1), other, place / "other")
    write_adapter(random_adapter(model, 4, magnitudes=True), model, place / "norms")
    one = Engine(model, tokenizer, config=EngineConfig(block_size=8, cpu_kernels="off", **(settings or {})))
    asked = {"name": name, "changes": changes, "place": place}
    tokens, streamed, expected = answers(one, **asked)
    assert len({tuple(completion.token_ids) for completion in expected}) > 5

    found = pool.run(shared, use=answers_of, asked=asked, name=name, parallel=parallel, changes=changes, settings=settings)
    its_tokens, its_streamed, its_answers = found[0]
    assert its_tokens == tokens
    torch.testing.assert_close(torch.tensor(its_streamed), torch.tensor(streamed), atol=1e-5, rtol=0)
    for completion, wanted in zip(its_answers, expected, strict=True):
        assert (completion.token_ids, completion.cached_tokens) == (wanted.token_ids, wanted.cached_tokens)
        torch.testing.assert_close(log_probs_of(completion), log_probs_of(wanted), atol=1e-5, rtol=0)


def answers_of(engine, asked):
    of_dora = random_adapter(decoder(asked["name"], asked["changes"]), 4, magnitudes=True)
    with pytest.raises(RequestError, match="whose norms are of whole weights"):
        engine.load_adapter("norms", of_dora)
    with pytest.raises(ArtefactError, match="DoRA, whose norms are of whole weights, beside a sharded model"):
        engine.load_adapter("norms", asked["place"] / "norms")
    return answers(engine, **asked)


def log_probs_of(completion):
    return torch.tensor([one.log_probs.token for one in completion.log_probs])


@pytest.mark.parametrize(
    ("name", "parallel", "changes", "settings"),
    [
        ("dense", {"tensor": 2}, {}, {}),
        slow("experts", {"tensor": 2}, SHARED_EXPERT, {}),
        slow("experts", {"expert": 2}, SHARED_EXPERT, {}),
        slow("latent", {"tensor": 2}, {}, {}),
        slow("linear", {"tensor": 2}, {}, {}),
        slow("dense", {"tensor": 2}, {"attention_output_bias": True}, {"batch_invariant": True}),
        slow("dense", {"tensor": 2}, {}, {"speculation": {"method": "ngram"}}),
    ],
)
def test_two_processes_with_adapters_answer_as_one(two, tokenizer, tmp_path, name, parallel, changes, settings):
    compare(two, tokenizer, tmp_path, name, parallel, changes, settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parallel", "changes"),
    [
        ("dense", {"tensor": 4}, {"num_key_value_heads": 4}),
        ("experts", {"tensor": 2, "expert": 2}, {"num_experts": 8, **SHARED_EXPERT}),
        ("latent", {"tensor": 4}, {}),
        ("linear", {"tensor": 4}, {"num_key_value_heads": 4, "linear_num_key_heads": 4, "linear_num_value_heads": 4}),
    ],
)
def test_four_processes_with_adapters_answer_as_one(four, tokenizer, tmp_path, name, parallel, changes):
    compare(four, tokenizer, tmp_path, name, parallel, changes)


def test_commands_name_adapters_until_these_are_gone():
    numbers, whole = AdapterNumbers(), Adapter({})
    numbers.assign(numbers.next(), whole)
    shards = {0: Adapter({})}
    batch = Batch.empty(1)
    for adapter in (None, whole):
        batch.append_tokens([1], 0, [[0]], prompt_length=1, adapter=adapter)
    (received,) = decode(encode(Command("forward", (batch,)), numbers), shards).arguments
    assert received.adapters == [None, shards[0]] and batch.adapters == [None, whole]
    del batch, whole, adapter
    gc.collect()
    assert decode(encode(Command("weights_changed", ()), numbers), shards) == Command("weights_changed", ())
    assert shards == {}
