"""Stages that train on pictures in two processes write what they write in one."""

import pytest
import torch

from bessemer.core.metrics import read_metrics
from bessemer.model.vision.trained import load_trained_decoder
from tests.cases import slow

from ..posttraining import test_picture_preferences as preferences
from ..posttraining import test_picture_rewards as rewards
from ..posttraining import test_picture_training as supervised
from ..posttraining.test_picture_preferences import colours  # noqa: F401
from ..posttraining.test_picture_training import folder  # noqa: F401

# the folder of rewards has more files than that of preferences, and may be it too
asked = rewards.colours


def in_one_thread(train, *arguments, **options):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(*arguments, **options)
    torch.set_num_threads(threads)


def assert_same(one, two, names=("loss",), rtol=1e-3, atol=1e-4):
    for first, second in zip(*(read_metrics(place / "metrics.jsonl") for place in (one, two)), strict=True):
        for name in names:
            assert first[name] == pytest.approx(second[name], rel=1e-3, abs=1e-5), name
    first, second = (load_trained_decoder(place / "model").state_dict() for place in (one, two))
    for name, tensor in first.items():
        if name.endswith("self_attn.k_proj.bias"):
            # of all keys alike: it changes nothing, and its gradient is what rounding leaves
            continue
        torch.testing.assert_close(second[name], tensor, rtol=rtol, atol=atol, msg=name)
    assert not [*two.glob("pictures*.bin")]


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel": {"data_shard": 2}},
        slow({"parallel": {"pipeline": 2}}),
        slow({"parallel": {"tensor": 2}, "freeze": supervised.PROJECTOR_ALONE}),
        slow({"parallel": {"context": 2}, "validation_share": 0.3}),
        slow({"parallel": {"data_replicate": 2}, "adapter": {"rank": 2, "merge": True}}),
    ],
    ids=str,
)
def test_sft(two, folder, tmp_path, changes):  # noqa: F811
    alone = {name: value for name, value in changes.items() if name != "parallel"}
    in_one_thread(supervised.trained, folder, tmp_path / "one", **alone)
    two.run(supervised.trained, folder=folder, out=tmp_path / "two", **changes)
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_a_dtype_is_measured_on_pictures_by_all_processes(two, folder, tmp_path):  # noqa: F811
    """Which one it is depends on what else the machine does, so that the weights are not compared."""
    two.run(supervised.trained, folder=folder, out=tmp_path / "two", parallel={"data_shard": 2}, dtype="auto")
    losses = [line["loss"] for line in read_metrics(tmp_path / "two" / "metrics.jsonl")]
    assert losses and losses[-1] < losses[0]
    load_trained_decoder(tmp_path / "two" / "model")


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
@pytest.mark.parametrize("parallel", [{"data_shard": 2}, {"tensor": 2}], ids=str)
def test_preference(two, colours, tmp_path, loss, parallel):  # noqa: F811
    changes = {"steps": 2, "loss": loss}
    in_one_thread(preferences.trained, colours, tmp_path / "one", **changes)
    two.run(preferences.trained, colours=colours, out=tmp_path / "two", parallel=parallel, **changes)
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, {"rank": 4, "merge": True}], ids=["weights", "adapter"])
def test_rl(two, asked, tmp_path, adapter):
    changes = {"learning_rate": 1e-3, "dtype": "float32", "compile": False} | ({"adapter": adapter} if adapter else {})
    in_one_thread(rewards.run, asked, tmp_path / "one", **changes)
    two.run(rewards.run, colours=asked, out=tmp_path / "two", parallel={"data_shard": 2}, **changes)
    completions = [read_metrics(tmp_path / place / "completions.jsonl") for place in ("one", "two")]
    assert [one["completion"] for one in completions[0]] == [one["completion"] for one in completions[1]]
    assert_same(tmp_path / "one", tmp_path / "two", ("reward", "loss"), rtol=1e-2)


@pytest.mark.slow
def test_an_engine_whose_matrices_are_shared_samples_no_answers_about_pictures(two, asked, colours, tmp_path):  # noqa: F811
    with pytest.raises(AssertionError, match=r"ConfigError: parallel: tensor 2: .*take data_shard"):
        two.run(rewards.run, colours=asked, model=colours / "model", out=tmp_path, parallel={"tensor": 2})
