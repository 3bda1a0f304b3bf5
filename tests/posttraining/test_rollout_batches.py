"""From a rollout to mini-batches: REINFORCE++ beside plain loops over tokens, and new mini-batches in every epoch."""

import json
import math
import shutil
from statistics import fmean, stdev

import pytest
import torch
from safetensors.torch import load_file

from bessemer.core.errors import ConfigError
from bessemer.core.metrics import read_metrics
from bessemer.distributed.mesh import ALONE
from bessemer.posttraining.preference.objective import REFERENCE_LOG_PROBS as REFERENCE_OF_PAIRS
from bessemer.posttraining.rl.batches import AdvantageBatches, PairBatches
from bessemer.posttraining.rl.config import RLConfig
from bessemer.posttraining.rl.critic import CRITIC
from bessemer.posttraining.rl.objective import OLD, TOKEN_REFERENCE_LOG_PROBS
from bessemer.posttraining.rl.policy_sampler import JudgedGroup
from bessemer.posttraining.rl.stage import rl
from bessemer.posttraining.sampling.samples import ADVANTAGES, SAMPLER, Prompt, Sample
from bessemer.training.model_roles import POLICY
from tests.posttraining.test_ppo import data  # noqa: F401

#: Tokens of the prompt and of the answers to it, and what the answers are worth, by group.
LENGTHS = [(3, (4, 1)), (2, (6, 3)), (4, (1, 2)), (1, (3, 5))]
REWARDS = [[1.0, -0.5], [2.0, 0.25], [math.nan, 3.0], [0.0, 0.5]]
SETTINGS = {"data": ["prompts.jsonl"], "group_size": 2, "max_tokens": 8, "context_length": 64, "steps": 1}


def groups(rewards=REWARDS):
    """Every token of every completion is another one."""
    token, found = 10, []
    for number, (prompt, lengths) in enumerate(LENGTHS):
        samples = []
        for length in lengths:
            ids = [number + 1] * prompt + list(range(token, token + length))
            samples.append(Sample(Prompt("p"), ids, prompt, [-0.01 * id for id in ids[prompt:]], "", False))
            token += length
        totals_G = torch.tensor(rewards[number], dtype=torch.float64)
        found.append(JudgedGroup(samples, totals_G[:, None], totals_G, [{}] * len(samples)))
    return found


class Models:
    """A policy, a reference and a critic that say something of each token by its id. asked: how often each role was."""

    mesh = ALONE

    def __init__(self, shares):
        self.shares_prefixes = shares
        self.asked = []

    def log_probs(self, batch, role, temperature=1.0):
        self.asked.append(role)
        scale = {POLICY: -0.02, "reference": -0.05}[role]
        return (scale * batch.targets_BT).float() * (batch.targets_BT >= 0)

    def per_token(self, role, batch, compute):
        assert role == CRITIC
        self.asked.append(role)
        return 0.1 * batch.targets_BT.float() * (batch.targets_BT >= 0)


def by_token(batches, name):
    """The value of each token that is a target."""
    found = {}
    for batch in batches:
        for row, column in (batch.targets_BT >= 0).nonzero().tolist():
            token = int(batch.targets_BT[row, column])
            assert token not in found
            found[token] = float(batch.per_token[name][row, column])
    return found


@pytest.mark.parametrize("shares", [False, True], ids=["prompts for each", "prompts shared"])
@pytest.mark.parametrize("discount", [1.0, 0.9])
@pytest.mark.parametrize("algorithm", ["reinforce_pp", "reinforce_pp_baseline"])
def test_reinforce_plus_plus_whitens_rewards_to_go_over_the_tokens_of_the_rollout(algorithm, discount, shares):
    """Beside plain loops (Hu et al. 2025): the divergence is taken off the reward of its token, the answer's reward is given at
    the last one, and mean and deviation are of all tokens of all mini-batches."""
    settings = {"algorithm": algorithm, "kl": "reward", "beta": 0.1, "discount": discount, "batch_size": 4, "mini_batches": 2}
    config = RLConfig.parse({**SETTINGS, **settings}, "rl")
    rollout = groups()
    made = AdvantageBatches(config, [1.0], 0)(rollout, Models(shares))
    returns, of_samples = {}, []
    for group in rollout:
        known = [reward for reward in group.totals_G.tolist() if not math.isnan(reward)]
        baseline = fmean(known) if algorithm == "reinforce_pp_baseline" else 0.0
        for sample, reward in zip(group.samples, group.totals_G.tolist(), strict=True):
            tokens = [] if math.isnan(reward) else list(sample.completion_ids)
            rewards = [-0.1 * (-0.02 * token + 0.05 * token) for token in tokens]
            if rewards:
                rewards[-1] += reward - baseline
            for place, token in enumerate(tokens):
                returns[token] = sum(discount**later * value for later, value in enumerate(rewards[place:]))
            of_samples.append(tokens)
    mean, spread = fmean(returns.values()), stdev(returns.values())
    expected = {token: (value - mean) / math.sqrt(spread**2 + 1e-8) for token, value in returns.items()}
    assert len(made.batches) == 2
    assert by_token(made.batches, ADVANTAGES) == pytest.approx(expected, abs=1e-5)
    means = [fmean(expected[token] for token in tokens) if tokens else 0.0 for tokens in of_samples]
    assert made.advantages_R.tolist() == pytest.approx(means, abs=1e-5)


@pytest.mark.parametrize("shares", [False, True], ids=["prompts for each", "prompts shared"])
@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "reinforce_pp"])
def test_a_further_epoch_has_the_same_tokens_and_values_in_other_mini_batches(algorithm, shares):
    settings = {"algorithm": algorithm, "kl": "reward", "beta": 0.1, "batch_size": 4, "mini_batches": 2, "rollout_epochs": 2}
    config = RLConfig.parse({**SETTINGS, **settings, "group_size": 2}, "rl")
    models, rollout = Models(shares), groups()
    made = AdvantageBatches(config, [1.0], 0)(rollout, models, [[2, 0, 3, 1]])
    first, second = made.batches[:2], made.batches[2:]
    for name in first[0].per_token:
        assert by_token(first, name) == by_token(second, name)
    assert {ADVANTAGES, OLD, TOKEN_REFERENCE_LOG_PROBS, SAMPLER} <= first[0].per_token.keys() == second[0].per_token.keys()
    assert by_token(second, OLD) == pytest.approx({token: -0.02 * token for token in by_token(second, OLD)})
    of_groups = [{id for sample in group.samples for id in sample.completion_ids} for group in rollout]
    tokens = [set(by_token([batch], OLD)) for batch in second]
    missing = set(rollout[2].samples[0].completion_ids)
    assert tokens == [(of_groups[2] | of_groups[0]) - missing, of_groups[3] | of_groups[1]]
    # models are asked once of each mini-batch of the rollout, not again
    assert len(models.asked) == 2 * (3 if algorithm == "ppo" else 2)
    rewards = [sorted(batch.per_sequence["reward"].flatten().tolist()) for batch in second]
    assert [sum(values) for values in rewards] == [3.0 + 1.0 - 0.5, 0.0 + 0.5 + 2.0 + 0.25]
    counts = [batch.per_sequence["group_answers"].flatten().tolist() for batch in second]
    assert sorted(value for values in counts for value in values if value) == [1, 1, 2, 2, 2, 2, 2, 2]


def test_a_further_epoch_of_pairs_has_other_mini_batches():
    settings = {"algorithm": "online_dpo", "batch_size": 4, "mini_batches": 2, "rollout_epochs": 2}
    config = RLConfig.parse({**SETTINGS, **settings}, "rl")
    made = PairBatches(config, padding_id=0)(groups([[0.0, 1.0]] * 4), Models(False), [[2, 0, 3, 1]])
    values = [by_token([batch], REFERENCE_OF_PAIRS) for batch in made.batches]
    assert len(values) == 4 and values[0] | values[1] == values[2] | values[3]
    assert values[2] == {token: value for token, value in (values[0] | values[1]).items() if token in values[2]}
    of_groups = [{id for sample in group.samples for id in sample.completion_ids} for group in groups()]
    assert [set(one) for one in values[2:]] == [of_groups[2] | of_groups[0], of_groups[3] | of_groups[1]]


def run(model_folder, data, out, **changes):  # noqa: F811
    out.mkdir(exist_ok=True)
    settings = {
        "algorithm": "grpo",
        "group_size": 2,
        "batch_size": 4,
        "mini_batches": 3,
        "rollout_epochs": 3,
        "max_tokens": 4,
        "context_length": 64,
        "learning_rate": 1e-2,
        "diagnostics_every": 0,
        "validation_share": 0,
        "threads": 1,
        "checkpoint_every": 5,
        "steps": 9,
        "rewards": ["rewards.py:letters"],
        "data": ["prompts.jsonl"],
    }
    config = RLConfig.parse({**settings, **changes}, "rl")
    rl(config, model_folder, out, seed=3, device="cpu", folder=data)
    return load_file(out / "model" / "model.safetensors")


@pytest.mark.usefixtures("one_thread")
def test_a_run_stopped_within_a_shuffled_epoch_goes_on_bit_for_bit(model_folder, data, tmp_path, monkeypatch):  # noqa: F811
    from bessemer.posttraining.rl.rollouts import RolloutSource

    trained = {}
    batch_of = RolloutSource.batch

    def recorded(self, step, rows, *arguments):
        found = batch_of(self, step, rows, *arguments)
        trained[step] = json.dumps(sorted(found.targets_BT[found.targets_BT >= 0].tolist()))
        return found

    monkeypatch.setattr(RolloutSource, "batch", recorded)
    whole = run(model_folder, data, tmp_path / "whole")
    epochs = [[trained[step] for step in range(start, start + 3)] for start in (0, 3, 6)]
    assert all(sorted(epochs[0]) != sorted(epoch) for epoch in epochs[1:]) and sorted(epochs[1]) != sorted(epochs[2])
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "model")
    for path in (tmp_path / "cut" / "checkpoints").glob("*9*"):
        shutil.rmtree(path)
    cut = run(model_folder, data, tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert len(read_metrics(tmp_path / "cut" / "metrics.jsonl")) == 9


def test_a_discount_where_nothing_is_discounted_is_refused():
    for settings in ({"algorithm": "grpo"}, {"algorithm": "ppo", "group_size": 1}, {"algorithm": "online_dpo"}):
        with pytest.raises(ConfigError, match=r"discount: of the advantages reinforce_pp and reinforce_pp_baseline"):
            RLConfig.parse({**SETTINGS, **settings, "batch_size": 4, "discount": 0.9}, "rl")
