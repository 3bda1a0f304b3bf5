"""A draft model beside a model that several processes share."""

from __future__ import annotations

import pytest

from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.model.storage.folder import save_model
from tests.cases import slow
from tests.distributed.pool import pool_of
from tests.inference.models import BASE, small_tokenizer
from tests.inference.sharded import decoder, shared
from tests.inference.test_draft_model import drafted, near
from tests.model.randomised import random_decoder

PROMPTS = [[7], list(range(40, 73)), [9] * 20]
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
SEEDED = SamplingParams(seed=4, max_tokens=16, ignore_eos=True)

two, four = pool_of(2, "module"), pool_of(4, "module")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("sharded"))


def answers(engine, prompts):
    """Tokens of greedy and of seeded answers, how many drafts were right, and how many heads the draft's pages here have."""
    made = [engine.generate(prompts, params) for params in (GREEDY, SEEDED)]
    statistics, proposer = engine.statistics, engine.core.strategy.proposer
    assert proposer.pool.free == proposer.pool.total
    drafts = statistics.draft_tokens_proposed, statistics.draft_tokens_accepted
    return [[one.token_ids for one in some] for some in made], drafts, proposer.runner.memory.layers[0].keys.shape[1]


def compare(pool, tokenizer, draft, folder, name, parallel, changes=None, prompts=PROMPTS):
    """Answers with drafts on the pool, beside those of one process with the same drafts, and of one without; the heads here."""
    save_model(draft, folder / "draft", tokenizer=tokenizer.folder)
    settings = {"speculation": drafted(str(folder / "draft"))}
    model = decoder(name, changes)
    plain = Engine(model, tokenizer, config=EngineConfig(block_size=8, cpu_kernels="off"))
    one = Engine(model, tokenizer, config=EngineConfig(block_size=8, cpu_kernels="off", **settings))
    tokens, drafts, heads = pool.run(
        shared, use=answers, prompts=prompts, name=name, parallel=parallel, changes=changes, settings=settings
    )[0]
    expected, expected_drafts, _ = answers(one, prompts)
    assert tokens == expected and drafts == expected_drafts and drafts[1] > 0
    assert tokens == [[one.token_ids for one in plain.generate(prompts, params)] for params in (GREEDY, SEEDED)]
    return heads


def of_like_mind(config, name):
    """A dense draft model that is right now and then: it has the embedding of the model that it drafts for."""
    draft = random_decoder(config)
    draft.embed_tokens.load_state_dict(decoder(name).embed_tokens.state_dict())
    return draft


@pytest.mark.parametrize(
    ("name", "parallel", "heads"),
    [
        slow("dense", {"tensor": 2}, 1),
        slow("latent", {"tensor": 2}, 1),
        slow("experts", {"tensor": 2}, 1),
        # which a draft model without experts does not share
        slow("experts", {"expert": 2}, 2),
        slow("linear", {"tensor": 2}, 1),
    ],
)
def test_drafts_of_two_processes_are_those_of_one(two, tokenizer, tmp_path, name, parallel, heads):
    draft = near(decoder(name)) if name in ("dense", "latent") else of_like_mind(BASE, name)
    prompts = PROMPTS[:2] if name == "dense" else PROMPTS
    assert compare(two, tokenizer, draft, tmp_path, name, parallel, prompts=prompts) == heads


@pytest.mark.slow
def test_drafts_of_four_processes_are_those_of_one(four, tokenizer, tmp_path):
    changes = {"num_key_value_heads": 4}
    assert compare(four, tokenizer, near(decoder("dense", changes)), tmp_path, "dense", {"tensor": 4}, changes) == 1


@pytest.mark.slow
def test_a_draft_model_that_does_not_divide_is_computed_by_rank_0(two, tokenizer, tmp_path):
    draft = of_like_mind(BASE.with_changes(num_attention_heads=3, num_key_value_heads=3), "dense")
    assert compare(two, tokenizer, draft, tmp_path, "dense", {"tensor": 2}) == 3
