"""`bitwise_consistent`: at every step the trainer of `rl` finds the log-probabilities of its sampler, to the last bit."""

import pytest
import torch

from bessemer.core.errors import ConfigError
from bessemer.core.metrics import read_metrics
from bessemer.model.cpu_kernels import library
from bessemer.posttraining.rl import objective
from bessemer.posttraining.rl.config import RLConfig
from bessemer.posttraining.rl.objective import MismatchError
from bessemer.posttraining.sampling.sampler import rounded_copy
from tests.cases import slow, slow_but
from tests.inference.models import small_decoder

from .test_rl import SETTINGS, data, run  # noqa: F401

pytestmark = pytest.mark.skipif(library() is None, reason="there are no compiled kernels here")

METHODS = {
    "grpo": {},
    "mini-batches, epochs, a reference": {"mini_batches": 2, "rollout_epochs": 2, "beta": 0.05, "batch_size": 8},
    "ppo": {"algorithm": "ppo"},
    "an adapter": {"adapter": {"rank": 4, "alpha": 64}, "beta": 0.05, "learning_rate": 1e-1},
    "recomputed blocks, micro-batches": {"activation_checkpointing": "full", "micro_batch_size": 2, "temperature": 0.7},
}


@pytest.mark.parametrize("method", slow_but({"grpo", "recomputed blocks, micro-batches"}, METHODS))
def test_no_log_probability_differs_in_a_bit(method, model_folder, data, tmp_path):  # noqa: F811
    changes = {**METHODS[method], "validation_share": 0, "bitwise_consistent": True, "threads": 2}
    run(model_folder, data, tmp_path, **changes)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert len(lines) == SETTINGS["steps"]
    assert [line["log_ratio_max"] for line in lines] == [0.0] * len(lines)
    # without it they differ, by roundings
    plain = run(model_folder, data, tmp_path / "plain", **{**changes, "bitwise_consistent": False})
    assert plain["steps"] == SETTINGS["steps"]
    assert max(line["log_ratio_max"] for line in read_metrics(tmp_path / "plain" / "metrics.jsonl")) > 0


def test_one_bit_of_difference_stops_the_run(model_folder, data, tmp_path, monkeypatch):  # noqa: F811
    exact = objective.target_log_probs

    def in_error(*arguments, **named):
        log_probs_BT, entropy_BT = exact(*arguments, **named)
        return torch.nextafter(log_probs_BT, torch.zeros(())), entropy_BT

    monkeypatch.setattr(objective, "target_log_probs", in_error)
    with pytest.raises(MismatchError, match="log-probabilities are not the sampler's, by up to"):
        run(model_folder, data, tmp_path, bitwise_consistent=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "bfloat16"}, "bitwise_consistent does not go with dtype bfloat16: take float32"),
        ({"sampler_weights": "int8"}, "bitwise_consistent does not go with sampler_weights: int8"),
        (
            {"rollouts": "http://127.0.0.1:9"},
            "bitwise_consistent does not go with rollouts: servers sample by kernels of their own",
        ),
        ({"compile": True}, "bitwise_consistent does not go with compile: true"),
        ({"adapter": {"rank": 4, "dora": True}}, "bitwise_consistent does not go with adapter.dora"),
        ({"parallel": {"tensor": 2}}, "bitwise_consistent does not go with parallel.tensor: take data_replicate or data_shard"),
    ],
)
def test_what_cannot_agree_is_refused_before_the_run(changes, message):
    with pytest.raises(ConfigError, match=message):
        RLConfig.parse({"data": ["prompts.jsonl"], **SETTINGS, "bitwise_consistent": True, **changes}, "rl")


@pytest.mark.parametrize("adapter", [None, slow(4)], ids=["weights", "adapter"])
def test_a_rounded_sampler_is_measured_and_the_coarser_the_further(adapter, model_folder, data, tmp_path):  # noqa: F811
    gaps = {}
    for weights in ("policy", "int8", "fp8", "int4"):
        out = tmp_path / weights
        run(model_folder, data, out, steps=2, validation_share=0, sampler_weights=weights, adapter=adapter, learning_rate=1e-3)
        lines = read_metrics(out / "metrics.jsonl")
        assert all(line["log_ratio_max"] >= line["log_ratio"] and 0 <= line["log_ratio_over_cap"] <= 1 for line in lines)
        gaps[weights] = sum(line["log_ratio"] for line in lines) / len(lines)
    assert gaps["policy"] < 1e-5 < min(gaps["int8"], gaps["fp8"]) and max(gaps["int8"], gaps["fp8"]) < gaps["int4"]


@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("architecture", ["dense", "experts"])
def test_a_rounded_copy_leaves_the_policy_as_it_is(architecture, weights):
    model = small_decoder(architecture)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens_BT = torch.arange(3, 23)[None]
    moved = (rounded_copy(model, weights)(tokens_BT) - model(tokens_BT)).abs().max()
    assert 1e-4 < moved < 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
