"""An engine inside a job that trains: what its ranks sample from is what they train."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode

from bessemer.core.errors import ConfigError, LostProcessError, RequestError
from bessemer.distributed.layout import Layout, ParallelConfig
from bessemer.distributed.mesh import Mesh
from bessemer.inference.collective import CollectiveEngine, copy_trained
from bessemer.inference.config import EngineConfig
from bessemer.inference.engine import Engine, SamplingParams
from bessemer.inference.execution.runner import Runner
from bessemer.tokenization.bpe import byte_level_bpe
from bessemer.tokenization.folder import write_folder
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.training.data.batch import IGNORE_INDEX, Batch
from bessemer.training.model_roles import POLICY, ModelRoles
from bessemer.training.model_setup import prepare_model
from bessemer.training.pretrain_config import PretrainConfig
from bessemer.training.runtime import Runtime
from tests.cases import slow
from tests.distributed.pool import pool_of
from tests.inference.sharded import decoder
from tests.model.random_adapters import random_adapter

PARAMS = SamplingParams(temperature=0.7, max_tokens=10, seed=5, ignore_eos=True)
PROMPTS = [[7, 8, 9], list(range(40, 73)), [9] * 20, [11, 12]]
SETTINGS = {"batch_size": 8, "context_length": 64, "dtype": "float32", "compile": False, "threads": 1, "steps": 1}
#: Which the tensor axis divides in training too.
VOCABULARY = {"vocab_size": 264}

two, four = pool_of(2, "module"), pool_of(4, "module")


def models_of(name, changes, parallel):
    mesh = Mesh.here(ParallelConfig(**parallel), "cpu")
    config = PretrainConfig(**SETTINGS, parallel=parallel)
    runtime = Runtime.of(config, torch.device("cpu"))
    prepared = prepare_model(decoder(name, {**VOCABULARY, **changes}), config, runtime, mesh)
    return ModelRoles({POLICY: prepared}, runtime, mesh=mesh)


def engine_of(models, settings=None):
    config = EngineConfig(block_size=8, cpu_kernels="off", **(settings or {}))
    return CollectiveEngine(models.policy.model, tokenizer_of_264(), models.mesh, config)


def one_process(model):
    return Engine(model, tokenizer_of_264(), config=EngineConfig(block_size=8, cpu_kernels="off"))


def tokenizer_of_264():
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" a", b"in", b"on"]
    with TemporaryDirectory() as folder:
        write_folder(Path(folder), byte_level_bpe(tokens, "qwen2"))
        return load_tokenizer(Path(folder))


def batch_of(rollouts):
    """Rows whose targets are the sampled tokens."""
    tokens_BT, mask_BT = padded(rollouts.tokens), padded(rollouts.mask)
    return Batch(tokens_BT, tokens_BT.masked_fill(~mask_BT, IGNORE_INDEX).roll(-1, 1))


def padded(values_RT):
    return torch.nn.functional.pad(values_RT, (0, SETTINGS["context_length"] - values_RT.shape[1]))


def largest_difference(models, rollouts):
    """Between the sampler's log-probabilities and those of the model in training, over all rows of this rank."""
    trained_BT = models.log_probs(batch_of(rollouts), POLICY, temperature=PARAMS.temperature)
    sampled_BT = padded(rollouts.log_probs).roll(-1, 1)
    return float((trained_BT - sampled_BT)[padded(rollouts.mask).roll(-1, 1)].abs().max())


def train(models, rollouts):
    """One step of an optimizer."""
    model, batch = models.policy.model, models.cut(batch_of(rollouts))
    hidden_BTD = model.hidden(batch.tokens_BT, positions_BT=batch.positions_BT, document_ids_BT=batch.document_ids_BT)
    hidden_BTD[..., ::3].sum().backward()
    torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False).step()


def trained_and_sampled(name, changes, parallel, settings):
    """Rollouts of each rank's prompts before and after a step of training, beside the model in training."""
    models = models_of(name, changes, parallel)
    rank = models.mesh.layout.data_rank(models.mesh.rank)
    prompts, params = PROMPTS[rank:][:2], PARAMS.with_changes(seed=rank)
    with engine_of(models, settings) as engine:
        before = engine.rollouts(prompts, 2, params)
        found = [largest_difference(models, before)]
        train(models, before)
        found.append(largest_difference(models, before))
        engine.update_weights(version=3)
        after = engine.rollouts(prompts, 2, params)
        found.append(largest_difference(models, after))
        assert engine.weight_version == 3 and (after.weight_version[after.mask] == 3).all()
    return before.tokens, found


@pytest.mark.parametrize(
    ("name", "parallel", "changes", "settings"),
    [
        ("dense", {"tensor": 2}, {}, {}),
        slow("dense", {"data_shard": 2}, {}, {}),
        slow("experts", {"tensor": 2}, {"shared_expert_intermediate_size": 16}, {}),
        slow("experts", {"data_shard": 2, "expert": 2}, {}, {}),
        slow("latent", {"tensor": 2}, {}, {}),
        slow("linear", {"tensor": 2}, {}, {}),
        slow("dense", {"context": 2}, {}, {}),
        slow("dense", {"tensor": 2}, {}, {"speculation": {"method": "ngram"}}),
    ],
)
def test_two_ranks_sample_from_what_they_train(two, name, parallel, changes, settings):
    check(two.run(trained_and_sampled, name=name, changes=changes, parallel=parallel, settings=settings), name, changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parallel", "changes"),
    [
        ("dense", {"tensor": 2, "data_shard": 2}, {}),
        ("dense", {"tensor": 2, "data_replicate": 2}, {}),
        ("latent", {"tensor": 2, "data_shard": 2}, {}),
        ("linear", {"tensor": 2, "data_shard": 2}, {}),
        ("experts", {"tensor": 2, "data_shard": 2, "expert": 2}, {"num_experts": 8}),
        ("dense", {"tensor": 4}, {"num_key_value_heads": 4}),
    ],
)
def test_four_ranks_sample_from_what_they_train(four, name, parallel, changes):
    check(four.run(trained_and_sampled, name=name, changes=changes, parallel=parallel, settings=None), name, changes)


def check(found, name, changes):
    """Log-probabilities agree, but not between a step and the update; tokens are those of an engine of one process."""
    one = one_process(decoder(name, {**VOCABULARY, **changes}))
    expected = [one.rollouts(PROMPTS[rank:][:2], 2, PARAMS.with_changes(seed=rank)).tokens for rank in range(4)]
    groups = set()
    for tokens, (before, between, after) in found:
        assert before < 1e-4 and after < 1e-4 < between
        (group,) = [rank for rank, wanted in enumerate(expected) if torch.equal(tokens, wanted)]
        groups.add(group)
    assert groups == set(range(len(groups)))


def some_prompts(parallel):
    """Completions where one group of ranks has no prompts; the adapters of another; and what a rank without any gets."""
    models = models_of("dense", {}, parallel)
    mesh = models.mesh
    group = mesh.rank // mesh.layout.tensor
    with engine_of(models) as engine:
        with CommDebugMode() as communication:
            copy_trained(models.policy.model, engine._shard)
        travelled = communication.get_total_counts()
        none = engine.rollouts(PROMPTS if group else [], 2, PARAMS)
        model = decoder("dense", VOCABULARY)
        engine.load_adapter("one", random_adapter(model, 1))
        adapted = engine.generate(PROMPTS, PARAMS, adapter="one")
        engine.update_adapter("one", random_adapter(model, 2))
        updated = engine.generate(PROMPTS, PARAMS, adapter="one")
        scores = engine.score_items([([5, 6], [[7, 8]])])
    return travelled, len(none.tokens), [one.token_ids for one in adapted + updated], scores[0][0].total


def test_a_rank_without_prompts_waits_for_none(two):
    found = two.run(some_prompts, parallel={"data_replicate": 2})
    assert [count for _, count, *_ in found] == [0, 2 * len(PROMPTS)]


def test_a_tensor_group_gets_one_result_and_takes_shards_as_they_lie(two):
    (travelled, count, tokens, score), other = two.run(some_prompts, parallel={"tensor": 2})
    assert travelled == 0 and (count, tokens, score) == other[1:]
    one = one_process(decoder("dense", VOCABULARY))
    expected = []
    for seed in (1, 2):
        one.load_adapter("one", random_adapter(one.model, seed))
        expected += [answer.token_ids for answer in one.generate(PROMPTS, PARAMS, adapter="one")]
    assert tokens == expected
    assert score == pytest.approx(one.score([5, 6], [[7, 8]])[0].total, abs=1e-5)


def failing(parallel, at):
    """What each rank is told when one refuses a prompt, and when one fails in the middle of a step; then of one call more."""
    models = models_of("dense", {}, parallel)
    engine, told = engine_of(models), []

    def ask(prompts):
        try:
            engine.generate(prompts, PARAMS)
        except Exception as error:
            told.append((type(error), str(error)))

    group = models.mesh.rank // models.mesh.layout.tensor
    ask(PROMPTS if group == 0 else [[1] * 1000])
    # nobody is out of step after that
    assert len(engine.generate(PROMPTS, PARAMS)) == 4
    forward = Runner._hidden

    def fail(runner, batch, *rest):
        if models.mesh.rank == at:
            raise ValueError("no memory")
        return forward(runner, batch, *rest)

    with patch.object(Runner, "_hidden", fail):
        ask(PROMPTS)
    ask(PROMPTS)
    return told


@pytest.mark.parametrize(("parallel", "at"), [({"tensor": 2}, 1), slow({"tensor": 2}, 0), slow({"data_replicate": 2}, 1)])
def test_an_error_of_one_rank_ends_the_call_on_both(two, parallel, at):
    check_failures(two.run(failing, parallel=parallel, at=at), parallel, at)


@pytest.mark.slow
@pytest.mark.parametrize("at", range(4))
def test_an_error_of_one_rank_ends_the_call_on_all_four(four, at):
    check_failures(four.run(failing, parallel={"tensor": 2, "data_shard": 2}, at=at), {"tensor": 2, "data_shard": 2}, at)


def check_failures(found, parallel, at):
    for rank, told in enumerate(found):
        if len(found) > parallel.get("tensor", 1):
            kind, line = told.pop(0)
            assert kind is RequestError and "1,000 tokens" in line
        (kind, line), *more = told
        assert "no memory" in line and kind in ({LostProcessError, ValueError} if rank == at else {LostProcessError})
        if "tensor" in parallel:
            assert more == [(LostProcessError, f"process {at} of the job failed: no memory")]


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"parallel": {"tensor": 2}}, "the mesh of the job says"), ({"cpu_kernels": "on"}, "do not go together")],
)
def test_settings_that_do_not_fit_a_job_are_refused(settings, named):
    with pytest.raises(ConfigError, match=named):
        CollectiveEngine(decoder("dense"), None, Mesh(Layout(tensor=2)), EngineConfig.parse(settings))
    with pytest.raises(ConfigError, match="pipeline 2: each rank trains some layers"):
        CollectiveEngine(decoder("dense"), None, Mesh(Layout(pipeline=2)))
