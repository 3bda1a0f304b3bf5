"""PPO: advantages of tokens from a critic that learns beside the policy."""

import json
import shutil
from statistics import fmean, median, stdev

import pytest
import torch
from safetensors.torch import load_file

from bessemer.core.errors import ConfigError
from bessemer.core.metrics import read_metrics
from bessemer.core.stage import Input
from bessemer.distributed.mesh import ALONE
from bessemer.model.storage.folder import as_scorer
from bessemer.pipeline.recipe import load_recipe
from bessemer.posttraining.rl.config import CriticConfig, RLConfig
from bessemer.posttraining.rl.critic import CRITIC, OLD_VALUES, RETURNS, ActorCriticObjective, token_values, with_values
from bessemer.posttraining.rl.objective import PolicyObjective
from bessemer.posttraining.rl.stage import rl
from bessemer.posttraining.sampling.samples import ADVANTAGES, Prompt, Sample, pack_samples
from bessemer.training.objectives import LossContext
from tests.inference.models import small_decoder

SETTINGS = {
    "algorithm": "ppo",
    "critic": {"learning_rate_factor": 1.0},
    "rollout_epochs": 2,
    "beta": 0.02,
    "batch_size": 16,
    "max_tokens": 8,
    "context_length": 64,
    "learning_rate": 1e-2,
    "diagnostics_every": 0,
    "validation_share": 0.2,
    "threads": 1,
    "evaluate_every": 100,
    "rewards": ["rewards.py:letters"],
    "data": ["prompts.jsonl"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "rewards.py").write_text(
        'def letters(completions, **kwargs):\n    return [text.count("e") / 8 for text in completions]\n\n\n'
        'def of_prompt(prompts, **kwargs):\n    return [float("node" in prompt) for prompt in prompts]\n',
        encoding="utf-8",
    )
    rows = [{"prompt": f"Return the {'node' if number % 2 else 'edge'} of {number}"} for number in range(20)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def run(model_folder, data, out, seed=3, **changes):
    out.mkdir(exist_ok=True)
    config = RLConfig.parse({**SETTINGS, **changes}, "rl")
    return rl(config, model_folder, out, seed=seed, device="cpu", folder=data)


def runs(model_folder, data, out, **changes):
    """Of three seeds, whose paths differ with a processor's rounding: the summary, and the lines of the rollouts."""
    for seed in (3, 4, 5):
        summary = run(model_folder, data, out / str(seed), seed, steps=24, batch_size=32, **changes)
        yield summary, [line for line in read_metrics(out / str(seed) / "metrics.jsonl") if "reward" in line]


@pytest.mark.usefixtures("one_thread")
def test_policy_and_critic_learn_from_single_completions(model_folder, data, tmp_path):
    gains, shares = [], []
    for summary, lines in runs(model_folder, data, tmp_path):
        assert len(lines) == 12 and "equal_groups" not in lines[0]
        gains.append(summary["validation_reward"] - summary["validation_reward_before"])
        # a new head says nothing; at the end it follows the reward
        assert abs(lines[0]["value"]) < 0.05
        shares.append(summary["value"] / fmean(line["reward"] for line in lines[-3:]))
    assert median(gains) > 0.1
    assert median(shares) == pytest.approx(1, abs=0.5)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_critic_knows_after_a_while_which_prompts_are_rewarded(model_folder, data, tmp_path):
    known = []
    for _, lines in runs(model_folder, data, tmp_path, rewards=["rewards.py:of_prompt"], beta=0, validation_share=0):
        assert lines[0]["explained_variance"] < 0.1
        known.append(fmean(line["explained_variance"] for line in lines[-3:]))
    assert median(known) > 0.5


@pytest.mark.usefixtures("one_thread")
def test_a_run_goes_on_bit_for_bit_and_the_critic_with_it(model_folder, data, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(model_folder, data, whole, steps=4, checkpoint_every=3)
    # what an interruption after step 3 leaves
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "model")
    for path in (cut / "checkpoints").glob("*4*"):
        shutil.rmtree(path)
    run(model_folder, data, cut, steps=4, checkpoint_every=3)
    first, second = (load_file(place / "model" / "model.safetensors") for place in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)


def samples():
    prompt = Prompt("p")
    lengths = [(3, 4), (2, 6), (4, 1), (1, 3)]
    return [Sample(prompt, list(range(1, first + own + 1)), first, [-0.5] * own, "", False) for first, own in lengths]


def test_advantages_of_packed_tokens_are_those_of_each_completion_alone():
    """Beside plain loops: rewards at the last token, a penalty at each, a critic that says something of every token; a
    completion without a reward takes no part."""
    made, rewards = samples(), [1.0, -0.5, float("nan"), 2.0]
    parts = [pack_samples(made[:2], [True, True], 0), pack_samples(made[2:], [False, True], 0)]
    config = CriticConfig(discount=0.9, decay=0.7)

    class Critic:
        mesh = ALONE

        def per_token(self, role, batch, compute):
            assert role == CRITIC and compute is token_values
            return (batch.tokens_BT * 0.1).double() * (batch.targets_BT >= 0)

    penalties = [one.batch.tokens_BT * 0.01 for one in parts]
    valued = with_values(parts, torch.tensor(rewards, dtype=torch.float64), penalties, Critic(), config)
    expected, returns = [], []
    for sample, reward in zip(made, rewards, strict=True):
        places = range(sample.prompt_length - 1, len(sample.ids) - 1) if reward == reward else range(0)
        values = [0.1 * sample.ids[t] for t in places] + [0.0]
        given = [-0.01 * sample.ids[t] for t in places]
        if given:
            given[-1] += reward
        errors = [given[i] + 0.9 * values[i + 1] - values[i] for i in range(len(given))]
        expected.append([sum((0.9 * 0.7) ** (j - i) * errors[j] for j in range(i, len(given))) for i in range(len(given))])
        returns.append([advantage + value for advantage, value in zip(expected[-1], values, strict=False)])
    flat = [value for one in expected for value in one]
    mean, spread = fmean(flat), stdev(flat)
    found = []
    for one, rows in zip(valued.packed, (made[:2], made[2:]), strict=True):
        for place, sample in enumerate(rows):
            end = int(one.ends_R[place])
            span = slice(end + 1 - len(sample.completion_ids), end + 1)
            row = int(one.rows_R[place])
            found.append([one.batch.per_token[name][row, span].tolist() for name in (ADVANTAGES, RETURNS)])
    for (advantages, learnt), alone, returned in zip(found, expected, returns, strict=True):
        if not alone:
            assert not any(advantages) and not any(learnt)
            continue
        assert advantages == pytest.approx([(value - mean) / spread for value in alone], abs=1e-6)
        assert learnt == pytest.approx(returned)
    means = [fmean((value - mean) / spread for value in one) if one else 0.0 for one in expected]
    assert valued.advantages_R.tolist() == pytest.approx(means, abs=1e-6)


def test_the_critics_loss_is_its_formula_and_moves_the_critic_alone():
    config = RLConfig.parse({**SETTINGS, "steps": 1}, "rl")
    objective = ActorCriticObjective(PolicyObjective.of(config), CriticConfig(weight=0.5, clip=0.2))
    critic = as_scorer(small_decoder("dense"), seed=1)
    packed = pack_samples(samples(), [True, True, False, True], 0)
    random = torch.Generator().manual_seed(1)
    shape = packed.batch.tokens_BT.shape
    old_BT, returns_BT = (torch.randn(shape, generator=random) for _ in range(2))
    batch = packed.batch.with_values(per_token={OLD_VALUES: old_BT, RETURNS: returns_BT})
    terms = objective(critic, batch, LossContext(role=CRITIC))
    with torch.no_grad():
        values_BT = token_values(critic, batch)
    expected, squares = 0.0, []
    for row, t in (batch.targets_BT >= 0).nonzero().tolist():
        value, old, wanted = (float(each[row, t]) for each in (values_BT, old_BT, returns_BT))
        held = min(max(value, old - 0.2), old + 0.2)
        expected += 0.5 * 0.5 * max((value - wanted) ** 2, (held - wanted) ** 2)
        squares.append((value - wanted) ** 2)
    assert list(terms.sums) == ["value"] and float(terms.sums["value"]) == pytest.approx(expected, rel=1e-5)
    assert objective.denominators(batch)["value"].value == len(squares)
    assert float(terms.metrics["value_error"].sum) == pytest.approx(sum(squares), rel=1e-5)


RECIPE = """
format: 1
name: one
collect: [python_docs]
tokenize: {algorithm: bpe, vocab_size: 261}
model: {preset: qwen3-1m, max_position_embeddings: 1024}
pretrain: {steps: 1}
%s
ppo: {kind: rl, data: [p.jsonl], steps: 1, algorithm: ppo, critic: {start: %s}, rewards: [%s]}
"""


def test_critic_and_reward_read_the_reward_model_above_where_they_are_asked(tmp_path):
    def wired(*settings):
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE % settings, encoding="utf-8")
        return load_recipe(str(path)).stage("ppo").inputs

    above, found = "reward: {data: [pairs.jsonl]}", Input("reward", "reward_model")
    assert wired(above, "reward_model", "answer")["reward_model"] == found
    assert wired(above, "policy", "reward_model")["reward_model"] == found
    assert "reward_model" not in wired(above, "policy", "answer")
    for asked in (("reward_model", "answer"), ("policy", "reward_model")):
        with pytest.raises(ConfigError, match=r"ppo: needs reward_model, and no stage above makes it; add reward:"):
            wired("", *asked)
