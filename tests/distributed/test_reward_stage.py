"""The stage `reward` on two processes: a new head on shards of a language model, and the reward model of one process."""

import pytest
import torch

from bessemer.model.storage.folder import load_model
from bessemer.posttraining.rewards.config import RewardConfig
from bessemer.posttraining.rewards.stage import reward

from ..posttraining.test_preference import SETTINGS, data  # noqa: F401
from ..training.conftest import documents, model_folder, tokenized  # noqa: F401

pytestmark = pytest.mark.slow


def trained(model, data, out, parallel):  # noqa: F811
    out.mkdir(exist_ok=True)
    settings = {**SETTINGS, "steps": 3, "threads": 1, "parallel": parallel}
    return reward(RewardConfig.parse({"data": [str(data)], **settings}, "reward"), model, out, seed=3, device="cpu")


@pytest.mark.parametrize("parallel", [{"data_shard": 2}, {"pipeline": 2}], ids=str)
def test_two_processes_make_the_reward_model_of_one(two, model_folder, data, tmp_path, parallel):  # noqa: F811
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = trained(model_folder, data, tmp_path / "one", {})
    torch.set_num_threads(threads)
    found = two.run(trained, model=model_folder, data=data, out=tmp_path / "two", parallel=parallel)[0]
    for name in ("validation_loss", "validation_accuracy", "held_out_accuracy", "pairs", "held_out"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name
    first, second = (load_model(tmp_path / place / "model", scores=True).state_dict() for place in ("one", "two"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-2, atol=1e-4, msg=name)
