"""Online preference optimisation: pairs of a prompt's best and worst completion."""

import math

import pytest
import torch

from bessemer.core.errors import ConfigError
from bessemer.core.metrics import read_metrics
from bessemer.distributed.mesh import ALONE
from bessemer.posttraining.preference.objective import REFERENCE_LOG_PROBS
from bessemer.posttraining.rl.batches import PairBatches
from bessemer.posttraining.rl.config import RLConfig
from bessemer.posttraining.rl.policy_sampler import JudgedGroup
from bessemer.posttraining.rl.stage import needs_reference
from bessemer.posttraining.sampling.samples import Prompt, Sample
from tests.posttraining.test_ppo import SETTINGS, data, run  # noqa: F401


def group(rewards, first_token):
    samples = [Sample(Prompt("p"), [1, 2, first_token + place, 9], 2, [-1.0, -1.0], "", False) for place in range(len(rewards))]
    totals_G = torch.tensor(rewards, dtype=torch.float64)
    return JudgedGroup(samples, totals_G[:, None], totals_G, [{}] * len(rewards))


@pytest.mark.parametrize("shares", [False, True])
def test_best_and_worst_are_a_pair_which_weighs_nothing_where_they_are_equal(shares):
    settings = {key: value for key, value in SETTINGS.items() if key not in ("algorithm", "critic", "rollout_epochs", "beta")}
    config = RLConfig.parse({**settings, "algorithm": "online_dpo", "group_size": 3, "batch_size": 12, "steps": 1}, "rl")
    nan = math.nan
    groups = [group([0.5, 2.0, -1.0], 10), group([1.0, 1.0, 1.0], 20), group([nan, 3.0, 0.0], 30), group([nan, nan, 1.0], 40)]

    class Models:
        mesh = ALONE
        shares_prefixes = shares

        def log_probs(self, batch, role):
            return torch.full(batch.tokens_BT.shape, -2.0)

    made = PairBatches(config, padding_id=0)(groups, Models())
    (batch,) = made.batches
    assert batch.rows_together == 1 and (batch.visible_to_BT is not None) == shares and made.figures == {"pairs": 2.0}
    assert made.advantages_R.tolist() == [0, 1, -1, 0, 0, 0, 0, 1, -1, 0, 0, 0]
    learnt = {}
    for row in range(batch.tokens_BT.shape[0]):
        targets = batch.targets_BT[row][batch.targets_BT[row] >= 0].tolist()
        weights = batch.per_sequence["pair_weight"][row].tolist()
        learnt |= {tuple(targets[4 * pair : 4 * pair + 4]): weights[2 * pair] for pair in range(len(targets) // 4)}
    assert learnt == {(11, 9, 12, 9): 1, (20, 9, 20, 9): 0, (31, 9, 32, 9): 1, (40, 9, 40, 9): 0}
    assert (batch.per_token[REFERENCE_LOG_PROBS] == -2).all()


@pytest.mark.usefixtures("one_thread")
def test_a_model_learns_from_pairs_of_its_own_completions(model_folder, data, tmp_path):  # noqa: F811
    changes = {"algorithm": "online_dpo", "critic": None, "rollout_epochs": 1, "group_size": 4, "batch_size": 64}
    summary = run(model_folder, data, tmp_path, steps=16, learning_rate=2e-2, **changes)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[-1]["reward"] > lines[0]["reward"] + 0.1 and lines[0]["pairs"] > 8
    assert summary["validation_reward"] > summary["validation_reward_before"]
    with pytest.raises(ConfigError, match=r"critic: not with pair_loss"):
        run(model_folder, data, tmp_path / "both", steps=1, **changes | {"critic": {}})


def test_a_loss_of_pairs_without_a_reference_holds_no_second_model():
    def needs(**changes):
        return needs_reference(RLConfig.parse({"data": ["p.jsonl"], "algorithm": "online_dpo", **changes}, "rl"))

    assert needs() and not needs(pair_loss="simpo") and not needs(adapter=4)
    assert not needs(algorithm="grpo") and needs(algorithm="grpo", beta=0.1)
