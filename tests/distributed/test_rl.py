"""Reinforcement learning on several processes is that of one: what is sampled, what it is worth, and what is learnt."""

import pytest
import torch

from bessemer.core.metrics import read_metrics
from bessemer.model.cpu_kernels import library
from bessemer.model.initialisation import initial_decoder
from bessemer.model.storage.folder import load_model, save_model
from bessemer.model.storage.model_config import read_model_config
from bessemer.posttraining.rl.config import RLConfig
from bessemer.posttraining.rl.stage import rl
from tests.cases import slow

from ..posttraining.test_rl import SETTINGS, data  # noqa: F401
from ..posttraining.test_served_rollouts import serving
from ..serving.running import servers
from ..training.conftest import documents, model_folder, tokenized  # noqa: F401

METHODS = {
    "grpo": {"algorithm": "grpo", "kl": "reward", "beta": 0.05, "mini_batches": 2},
    "ppo": {"algorithm": "ppo", "rollout_epochs": 2},
    "adapter": {"algorithm": "grpo", "kl": "reward", "beta": 0.05, "mini_batches": 2, "adapter": 4},
    "online_dpo": {"algorithm": "online_dpo", "group_size": 4},
}


#: Fails for all completions of the second process, and for none of the first one's.
ONE_SIDED = """
import torch.distributed as dist

def one_sided(completions, **kwargs):
    if dist.get_rank() == 1:
        raise OSError("the disk is full")
    return [float(len(text)) for text in completions]
"""


def trained(model, data, out, method, parallel, reward="rewards.py:letters", **changes):  # noqa: F811
    out.mkdir(exist_ok=True)
    settings = {
        **SETTINGS,
        "steps": 2,
        "batch_size": 8,
        "learning_rate": 1e-3,
        **METHODS[method],
        "parallel": parallel,
        **changes,
    }
    config = RLConfig.parse({"data": ["prompts.jsonl"], "rewards": [reward], **settings}, "rl")
    return rl(config, model, out, seed=3, device="cpu", folder=data)


@pytest.fixture(scope="module")
def model(model_folder, tmp_path_factory):  # noqa: F811
    """A model whose heads two ranks can share."""
    config = read_model_config(model_folder).with_changes(num_key_value_heads=2)
    folder = tmp_path_factory.mktemp("model")
    save_model(initial_decoder(config, seed=3), folder, tokenizer=model_folder)
    return folder


@pytest.mark.parametrize(
    ("method", "parallel"),
    [
        ("grpo", {"data_shard": 2}),
        slow("adapter", {"data_shard": 2}),
        slow("ppo", {"data_shard": 2}),
        slow("online_dpo", {"data_replicate": 2}),
        slow("grpo", {"tensor": 2}),
        slow("grpo", {"context": 2}),
    ],
    ids=str,
)
def test_two_processes_make_the_run_of_one(two, model, data, tmp_path, method, parallel):  # noqa: F811
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trained(model, data, tmp_path / "one", method, {})
    torch.set_num_threads(threads)
    two.run(trained, model=model, data=data, out=tmp_path / "two", method=method, parallel=parallel)
    completions = [read_metrics(tmp_path / place / "completions.jsonl") for place in ("one", "two")]
    assert [one["completion"] for one in completions[0]] == [one["completion"] for one in completions[1]]
    for first, second in zip(*(read_metrics(tmp_path / place / "metrics.jsonl") for place in ("one", "two")), strict=True):
        for name in ("reward", "loss", "entropy", "validation_reward"):
            assert (name in first) == (name in second)
            if name in first:
                assert first[name] == pytest.approx(second[name], rel=1e-3, abs=1e-5), name
    first, second = (load_model(tmp_path / place / "model").state_dict() for place in ("one", "two"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-2, atol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, 4], ids=["weights", "adapter"])
def test_two_processes_agree_with_their_samplers_to_the_bit(two, model, data, tmp_path, adapter):  # noqa: F811
    if library() is None:
        pytest.skip("there are no compiled kernels here")
    changes = {"bitwise_consistent": True, "adapter": adapter}
    two.run(trained, model=model, data=data, out=tmp_path, method="grpo", parallel={"data_shard": 2}, **changes)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["log_ratio_max"] for line in lines] == [0.0, 0.0]


@pytest.mark.slow
def test_completions_whose_reward_fails_on_one_process_are_left_out_on_all(two, model, data, tmp_path):  # noqa: F811
    (data / "one_sided.py").write_text(ONE_SIDED, encoding="utf-8")
    reward = "one_sided.py:one_sided"
    two.run(trained, model=model, data=data, out=tmp_path, method="grpo", parallel={"data_shard": 2}, reward=reward)
    completions = read_metrics(tmp_path / "completions.jsonl")
    assert sum(one["reward"] is None for one in completions) == len(completions) / 2


def test_a_pipeline_is_refused_by_all(two, model, data, tmp_path):  # noqa: F811
    error = "ConfigError: parallel: pipeline 2: each rank trains some layers, and "
    of_all = "".join(rf"(?=(.|\n)*rank {rank}: [^§]*{error})" for rank in (0, 1))
    with pytest.raises(AssertionError, match=of_all):
        two.run(trained, model=model, data=data, out=tmp_path / "a", method="grpo", parallel={"pipeline": 2})


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{"data_shard": 2}, slow({"tensor": 2})], ids=str)
def test_two_processes_with_a_server_make_the_run_of_one_without(two, model, data, tmp_path, parallel):  # noqa: F811
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trained(model, data, tmp_path / "one", "grpo", {})
    with servers() as start:
        url = start(serving(model), accept_weights=True)
        changes = {"method": "grpo", "parallel": parallel, "rollouts": [url]}
        two.run(trained, model=model, data=data, out=tmp_path / "two", **changes)
    torch.set_num_threads(threads)
    completions = [read_metrics(tmp_path / place / "completions.jsonl") for place in ("one", "two")]
    assert [one["completion"] for one in completions[0]] == [one["completion"] for one in completions[1]]
