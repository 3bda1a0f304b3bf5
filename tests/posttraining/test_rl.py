"""The stage `rl` on small models: it learns what is rewarded, resumes bit for bit, and stops when it cannot go on."""

import json
import math
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bessemer.core.errors import ConfigError, SourceError
from bessemer.core.metrics import read_metrics
from bessemer.core.progress import Silent
from bessemer.core.report import StageReport
from bessemer.inference.engine import Engine
from bessemer.model.storage.folder import load_model
from bessemer.pipeline.recipe import load_recipe
from bessemer.posttraining.data.examples import drawn
from bessemer.posttraining.rewards.config import RewardContext
from bessemer.posttraining.rewards.judge import Judge, RewardError
from bessemer.posttraining.rl import specs as report
from bessemer.posttraining.rl import stage as rl_stage
from bessemer.posttraining.rl.config import RLConfig
from bessemer.posttraining.rl.objective import PolicyObjective
from bessemer.posttraining.rl.policy_sampler import PolicySampler
from bessemer.posttraining.rl.rollouts import CollapseError, RolloutSource, check_collapse
from bessemer.posttraining.rl.stage import gather_prompts, rl
from bessemer.posttraining.sampling import sampler as sampling
from bessemer.posttraining.sampling.samples import Prompt, Sample
from bessemer.training.data.batch import IGNORE_INDEX
from bessemer.training.model_roles import POLICY, ModelRoles
from bessemer.training.model_setup import PreparedModel
from bessemer.training.objectives import LossContext
from bessemer.training.runtime import Runtime
from tests.cases import slow
from tests.inference.models import small_decoder, small_tokenizer
from tests.training.conftest import RecordedProgress

SETTINGS = {
    "steps": 4,
    "batch_size": 16,
    "group_size": 4,
    "max_tokens": 8,
    "context_length": 64,
    "learning_rate": 1e-2,
    "diagnostics_every": 0,
    "validation_share": 0.2,
    "threads": 1,
    "evaluate_every": 100,
}
#: The share of a completion's characters that are the letter e: what a random model has some of and can learn to write.
REWARDS = """
def letters(completions, **kwargs):
    return [text.count("e") / 8 for text in completions]

def refuses(completions, **kwargs):
    return [None for _ in completions]

def breaks(completions, number, **kwargs):
    return [float("nan") if n % 4 == 1 else float(len(text)) for text, n in zip(completions, number)]

def clock(prompts, completions, trainer_state, log_extra, log_metric, **kwargs):
    for text in completions:
        log_extra("completion", [text.upper()])
    log_metric("sampled", len(completions))
    return [float(trainer_state.global_step)] * len(completions)

def equal(completions, number, **kwargs):
    # all completions of every other prompt are worth the same
    return [1.0 if n % 2 else 1.0 + len(set(text)) for text, n in zip(completions, number)]
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "rewards.py").write_text(REWARDS, encoding="utf-8")
    rows = [
        {"prompt": f"Return the {word} of", "number": number}
        for number, word in enumerate(["table", "graph", "node", "edge"] * 5)
    ]
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps(row | {"prompt": row["prompt"] + " x" * (row["number"] // 4)}) + "\n" for row in rows),
        encoding="utf-8",
    )
    return folder


def run(model_folder, data, out, progress=None, **changes):
    out.mkdir(exist_ok=True)
    config = RLConfig.parse({"data": ["prompts.jsonl"], "rewards": ["rewards.py:letters"], **SETTINGS, **changes}, "rl")
    return rl(config, model_folder, out, seed=3, device="cpu", folder=data, progress=progress)


@pytest.mark.usefixtures("one_thread")
def test_a_model_learns_to_write_what_is_rewarded_and_every_completion_is_logged(model_folder, data, tmp_path):
    summary = run(model_folder, data, tmp_path, steps=16, batch_size=32, learning_rate=2e-2)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[-1]["reward"] > lines[0]["reward"] + 0.2
    assert summary["validation_reward"] > summary["validation_reward_before"] + 0.2
    assert max(line["log_ratio_max"] for line in lines) < 1e-4
    completions = read_metrics(tmp_path / "completions.jsonl")
    assert [sum(one["step"] == step for one in completions) for step in (1, 16)] == [32, 32]
    assert all(one["reward"] == pytest.approx(one["completion"].count("e") / 8) for one in completions)
    of_first = [one["reward"] for one in completions if one["step"] == 1]
    assert lines[0]["reward"] == pytest.approx(sum(of_first) / 32)
    section = report.report(StageReport(name="rl", kind="rl", metrics=summary, folder=tmp_path, records=lines))
    shown = repr(section.parts)
    assert "Reward" in shown and "Completions along the way" in shown and "held out, greedy" in shown


@pytest.mark.usefixtures("one_thread")
def test_a_limit_of_time_leaves_as_many_rollouts_as_fit(model_folder, data, tmp_path):
    progress = RecordedProgress()
    # a step takes some hundredths of a second: none of these machines makes so many in half a second
    summary = run(model_folder, data, tmp_path, progress, steps=100_000, minutes=1 / 120, validation_share=0)
    assert 1 <= summary["steps"] < 10_000
    written = json.loads((tmp_path / "autotune.json").read_text(encoding="utf-8"))
    assert written["steps"] == summary["steps"] == written["measured"]["steps"]
    assert written["measured"]["planned_steps"] == 100_000
    assert f"{summary['steps']:,} of 100,000 steps" in " ".join(progress.lines)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("stop", [slow(2, id="between rollouts"), pytest.param(3, id="within a rollout")])
def test_a_run_goes_on_bit_for_bit_where_it_stopped(model_folder, data, tmp_path, stop):
    changes = {
        "mini_batches": 2,
        "batch_size": 8,
        "checkpoint_every": stop,
        "beta": 0.1,
        "kl": "reward",
        "dynamic_sampling": True,
    }
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(model_folder, data, whole, **changes)
    # what an interruption after that step leaves
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "model")
    for path in (cut / "checkpoints").glob("*4*"):
        shutil.rmtree(path)
    run(model_folder, data, cut, **changes)
    first, second = (load_file(place / "model" / "model.safetensors") for place in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (whole / "completions.jsonl").read_text(encoding="utf-8") == (cut / "completions.jsonl").read_text(encoding="utf-8")


@pytest.mark.usefixtures("one_thread")
def test_a_sampler_whose_cache_is_free_while_training_samples_the_same(model_folder, data, tmp_path):
    for name, sleep in (("awake", False), ("asleep", True)):
        run(model_folder, data, tmp_path / name, steps=2, sleep=sleep)
    awake, asleep = ((tmp_path / name / "completions.jsonl").read_text(encoding="utf-8") for name in ("awake", "asleep"))
    assert awake == asleep


def as_on_a_card(monkeypatch):
    """A copy of the weights samples, and products in half precision are fast, whatever this processor has."""
    monkeypatch.setattr(sampling, "_COPYING_DEVICES", ("cpu",))
    monkeypatch.setattr("bessemer.model.device.product_cost", lambda dtype, device: 1.0)


@pytest.mark.usefixtures("one_thread")
def test_on_a_card_a_copy_in_the_dtype_of_the_products_samples_with_the_weights_of_each_step(
    model_folder, data, tmp_path, monkeypatch
):
    engines = []

    class Watched(Engine):
        def __init__(self, model, *given, **named):
            engines.append(model)
            super().__init__(model, *given, **named)

    as_on_a_card(monkeypatch)
    monkeypatch.setattr(sampling, "Engine", Watched)
    run(model_folder, data, tmp_path, steps=2, dtype="bfloat16", learning_rate=2e-2)
    (copy,) = engines
    assert copy.dtype == torch.bfloat16
    before, trained = (load_model(folder).state_dict() for folder in (model_folder, tmp_path / "model"))
    # filled for the second rollout, by the first step's weights, which the second step has moved on from
    moved = {name: (copy.state_dict()[name].float() - tensor.float()).norm() for name, tensor in trained.items()}
    assert sum(moved.values()) > 0
    assert sum(moved.values()) < sum((before[name].float() - tensor.float()).norm() for name, tensor in trained.items())
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert max(line["log_ratio_max"] for line in lines) < 0.1


@pytest.mark.usefixtures("one_thread")
def test_on_a_card_an_adapter_is_passed_beside_the_copy_that_samples(model_folder, data, tmp_path, monkeypatch):
    as_on_a_card(monkeypatch)
    run(model_folder, data, tmp_path, steps=2, dtype="bfloat16", learning_rate=2e-2, adapter={"rank": 2})
    # the second rollout is by the adapter of the first step
    assert max(line["log_ratio_max"] for line in read_metrics(tmp_path / "metrics.jsonl")) < 0.1


def test_on_a_card_bfloat16_and_a_cache_that_sleeps_are_what_is_not_given(monkeypatch):
    monkeypatch.setattr(rl_stage, "is_fast", lambda dtype, device: True)
    given = RLConfig.parse({"data": ["x.jsonl"], "rewards": ["r.py:f"]}, "rl")
    here, there = (rl_stage.settings_on(given, torch.device(name)) for name in ("cpu", "cuda"))
    assert (here.dtype, here.sleep, there.dtype, there.sleep) == ("float32", False, "bfloat16", True)
    chosen = rl_stage.settings_on(given.with_changes(dtype="float32", sleep=False), torch.device("cuda"))
    assert (chosen.dtype, chosen.sleep) == ("float32", False)


@pytest.mark.usefixtures("one_thread")
def test_completions_without_a_reward_are_left_out_and_counted(model_folder, data, tmp_path):
    progress = RecordedProgress()
    run(model_folder, data, tmp_path, progress, steps=2, rewards=["rewards.py:breaks"], validation_share=0)
    assert any("completions are dropped, the reward breaks: gave a value that is not finite" in line for line in progress.lines)
    completions = read_metrics(tmp_path / "completions.jsonl")
    dropped = [one for one in completions if one["reward"] is None]
    assert dropped and all(one["advantage"] == 0 for one in dropped)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert sum(line["dropped"] for line in lines) == len(dropped)
    with pytest.raises(RewardError, match=r"step 1: none of the 16 completions has a reward: no reward judges them"):
        run(model_folder, data, tmp_path / "none", rewards=["rewards.py:refuses"], validation_share=0)


def source_of(model, tokenizer, tmp_path, prompts, progress=None, folder=None, **changes):
    config = RLConfig.parse({"data": ["p.jsonl"], "rewards": ["rewards.py:letters"], **SETTINGS, **changes}, "rl")
    judge = Judge(config.rewards, RewardContext(folder or tmp_path))
    source = RolloutSource(PolicySampler(judge, tokenizer, config, 1), prompts, tmp_path, progress or Silent())
    runtime = Runtime.of(config, torch.device("cpu"))
    source.bind(ModelRoles({POLICY: PreparedModel(model, None)}, runtime))
    return source, config


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("architecture", ["dense", "experts", "latent", "linear"])
def test_sampler_and_trainer_agree_on_every_token_at_another_temperature(architecture, bytes_tokenizer, data, tmp_path):
    model = small_decoder(architecture).train()
    prompts = [Prompt(f"{'ab ' * number}c", {"number": number}) for number in range(1, 5)]
    source, config = source_of(model, bytes_tokenizer, tmp_path, prompts, folder=data, temperature=0.7, max_tokens=24)
    batch = source.batch(0, slice(None))
    terms = PolicyObjective.of(config)(model, batch, LossContext())
    source.close()
    assert batch.targets > 16 and model.training
    assert float(terms.metrics["log_ratio"].max) < 1e-4


@pytest.mark.usefixtures("one_thread")
def test_equal_groups_are_sampled_again_within_a_bound(bytes_tokenizer, data, tmp_path):
    model = small_decoder("dense")
    prompts = [Prompt(f"prompt {number}", {"number": number}) for number in range(24)]
    source, _ = source_of(
        model,
        bytes_tokenizer,
        tmp_path,
        prompts,
        folder=data,
        rewards=["rewards.py:equal"],
        dynamic_sampling=True,
        most_refills=2,
    )
    source.batch(0, slice(None))
    figures = source.take_metrics()
    source.close()
    rewards = {}
    for one in read_metrics(tmp_path / "completions.jsonl"):
        rewards.setdefault(one["group"], set()).add(one["reward"])
    assert len(rewards) == 4 and 1 <= figures["refills"] <= 2 and figures["equal_groups"] > 0
    # those that differ come first, and equal ones fill up what the bound leaves
    differ = [len(values) > 1 for values in rewards.values()]
    assert differ == sorted(differ, reverse=True) and any(differ)


@pytest.mark.usefixtures("one_thread")
def test_a_completion_cut_at_the_most_tokens_has_no_end_reward_where_so_asked(bytes_tokenizer, data, tmp_path):
    model = small_decoder("dense")
    prompts = [Prompt(f"prompt {number}", {"number": 2}) for number in range(4)]
    found = {}
    for truncated in ("judge", "zero", "drop"):
        out = tmp_path / truncated
        out.mkdir()
        # a token that ends a third of the completions, by its text
        source, _ = source_of(
            model,
            bytes_tokenizer,
            out,
            prompts,
            folder=data,
            rewards=["rewards.py:equal"],
            truncated=truncated,
            stop=["a", "b", "c", "d"],
        )
        batch = source.batch(0, slice(None))
        source.close()
        found[truncated] = (batch, read_metrics(out / "completions.jsonl"))
    cut = [one["cut"] for one in found["judge"][1]]
    assert any(cut) and not all(cut)
    assert all(one["reward"] > 0 for one in found["judge"][1])
    assert [one["reward"] == 0 for one in found["zero"][1]] == cut
    assert [one["reward"] is None for one in found["drop"][1]] == cut
    # what ended with a stop text has the token that holds it among its targets
    tokens = sum(one["tokens"] for one, is_cut in zip(found["drop"][1], cut, strict=True) if not is_cut)
    assert int((found["drop"][0].targets_BT != IGNORE_INDEX).sum()) == tokens


@pytest.mark.usefixtures("one_thread")
def test_a_policy_that_collapses_stops_the_run_and_says_so(model_folder, data, tmp_path):
    with pytest.raises(
        CollapseError, match=r"step \d+: the policy has collapsed: a token's entropy is 3\.\d+ nats, below min_entropy 4.0"
    ):
        run(model_folder, data, tmp_path / "entropy", steps=30, learning_rate=3e-2, min_entropy=4.0, validation_share=0)
    with pytest.raises(CollapseError, match=r"a token's KL divergence is \d+\.\d+ nats, above max_kl 0.05"):
        run(model_folder, data, tmp_path / "kl", steps=30, beta=1e-6, max_kl=0.05, learning_rate=3e-2, validation_share=0)


def test_a_divergence_is_that_of_the_completions_that_count():
    def sample(tokens):
        return Sample(Prompt("?"), [1] * (tokens + 1), 1, [-1.0] * tokens, "", True)

    config = RLConfig.parse({"data": ["p.jsonl"], "beta": 0.1, "max_kl": 0.5}, "rl")
    worth = torch.tensor([1.0, math.nan])
    with pytest.raises(CollapseError, match=r"1\.0000 nats, above max_kl"):
        check_collapse(config, 0, [sample(10), sample(90)], worth, torch.tensor([10.0, 0.0]))
    check_collapse(config, 0, [sample(10), sample(90)], worth, torch.tensor([4.0, 0.0]))


@pytest.mark.usefixtures("one_thread")
def test_decoupled_rewards_heed_the_divergence_and_what_was_cut(model_folder, data, tmp_path):
    rewards = {"rewards": ["rewards.py:letters", "rewards.py:equal"], "reward_scale": "decoupled", "validation_share": 0}
    weights = []
    for beta in (1e-6, 5.0):
        run(model_folder, data, tmp_path / str(beta), kl="reward", beta=beta, steps=3, **rewards)
        weights.append(load_file(tmp_path / str(beta) / "model" / "model.safetensors"))
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    run(model_folder, data, tmp_path / "cut", truncated="zero", steps=1, max_tokens=1, **rewards)
    completions = read_metrics(tmp_path / "cut" / "completions.jsonl")
    assert all(one["advantage"] == 0 for one in completions if one["cut"]), "all are cut, and all worth as much"
    assert any(one["cut"] for one in completions)


@pytest.mark.usefixtures("one_thread")
def test_a_reward_knows_the_step_and_logs_under_any_name(model_folder, data, tmp_path):
    summary = run(model_folder, data, tmp_path, steps=2, rewards=["rewards.py:clock", "rewards.py:letters"])
    assert (summary["validation_clock_before"], summary["validation_clock"]) == (0, 2)
    assert all(one["extra_completion"] == one["completion"].upper() for one in read_metrics(tmp_path / "completions.jsonl"))
    assert all(line["sampled"] == 16 for line in read_metrics(tmp_path / "metrics.jsonl"))


@pytest.mark.usefixtures("one_thread")
def test_what_no_reward_judges_has_no_mean(model_folder, data, tmp_path):
    """The manifest of a stage is JSON, which has no word for it."""
    summary = run(model_folder, data, tmp_path, steps=1, rewards=["rewards.py:letters", "rewards.py:refuses"])
    assert "validation_letters" in summary and "validation_refuses" not in summary
    json.dumps([summary, *read_metrics(tmp_path / "metrics.jsonl")], allow_nan=False)


def test_what_is_validated_is_drawn_from_all_that_is_held_out():
    assert drawn([1, 2, 3], 3, seed=0) == [1, 2, 3]
    some = drawn(range(1000), 100, seed=0)
    assert len(set(some)) == 100 and 400 < statistics.fmean(some) < 600 and some == drawn(range(1000), 100, seed=0)


def test_a_system_message_is_the_settings_where_a_prompt_has_none(tmp_path):
    own = [{"role": "system", "content": "Own."}, {"role": "user", "content": "Who?"}]
    rows = [{"prompt": own}, {"prompt": own[1:]}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = RLConfig.parse({"data": ["p.jsonl"], "system": "Ours.", "validation_share": 0}, "rl")
    found = gather_prompts(config, tmp_path, 1).training
    assert [[message["content"] for message in one.turns] for one in found] == [["Own.", "Who?"], ["Ours.", "Who?"]]


def test_prompts_that_differ_in_any_message_are_told_apart(tmp_path):
    rows = [
        {"prompt": [{"role": "system", "content": f"Sum {number}"}, {"role": "user", "content": "Solve it."}]}
        for number in range(100)
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = gather_prompts(RLConfig.parse({"data": ["p.jsonl"], "validation_share": 0.3}, "rl"), tmp_path, 1)
    assert 15 < len(found.held_out) < 45


def test_prompts_are_rows_or_questions_and_sums_stay_on_one_side(tmp_path):
    (tmp_path / "sums.yaml").write_text(
        'kind: arithmetic\nlevels: [1]\noperators: "+"\nitems: 100\nmax_tokens: 4\n', encoding="utf-8"
    )
    config = RLConfig.parse({"data": ["sums.yaml"], "validation_share": 0.3, "max_tokens": 4}, "rl")
    found = gather_prompts(config, tmp_path, 0)
    assert len(found.training) + len(found.held_out) == 100 and found.held_out
    assert found.training[0].stop == ("\n",) and found.training[0].columns["task"] == "sums"
    sides = [
        {frozenset(prompt.turns.rstrip(" =").split(" + ")) for prompt in side} for side in (found.training, found.held_out)
    ]
    assert not sides[0] & sides[1]
    (tmp_path / "rows.csv").write_text("question,answer\nWho?,Me\n", encoding="utf-8")
    asked = gather_prompts(
        config.with_changes(data=["rows.csv"], prompt_column="question", chat=True, system="Be brief."), tmp_path, 0
    )
    (prompt,) = [*asked.training, *asked.held_out]
    assert [message["role"] for message in prompt.turns] == ["system", "user"] and prompt.columns == {"answer": "Me"}
    (tmp_path / "bad.jsonl").write_text(
        '{"prompt": "a"}\n{"prompt": [{"role": "assistant", "content": "b"}]}\n', encoding="utf-8"
    )
    with pytest.raises(SourceError, match=r"bad.jsonl:2: prompt: the prompt ends with the assistant"):
        gather_prompts(config.with_changes(data=["bad.jsonl"]), tmp_path, 0)
    with pytest.raises(ConfigError, match=r"data: 'additions' is neither a file of .* nor a task; there are"):
        gather_prompts(config.with_changes(data=["additions"]), tmp_path, 0)
    with pytest.raises(ConfigError, match=r"the task piqa is asked by likelihood"):
        (tmp_path / "physical_interaction_qa.jsonl").write_text("", encoding="utf-8")
        (tmp_path / "piqa.yaml").write_text("kind: cloze\ndata: a.jsonl\nname: piqa\n", encoding="utf-8")
        (tmp_path / "a.jsonl").write_text('{"context": "a", "continuation": "b"}\n', encoding="utf-8")
        gather_prompts(config.with_changes(data=["piqa.yaml"]), tmp_path, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm": "grop"}, r"there is no algorithm 'grop'; did you mean 'grpo'"),
        ({"top_p": 0.9}, r"rl samples from the whole distribution"),
        ({"batch_size": 10, "group_size": 4}, r"batch_size 10 is no multiple of group_size 4"),
        ({"group_size": 1, "batch_size": 4}, r"advantage grpo compares .*: group_size must be 2 or more"),
        (
            {"algorithm": "ppo", "group_size": 1, "dynamic_sampling": True},
            r"dynamic_sampling compares .*: group_size must be 2 or more",
        ),
        ({"algorithm": "ppo", "reward_scale": "decoupled"}, r"a critic makes those of tokens"),
        ({"max_tokens": 64}, r"leaves no room for a prompt"),
        ({"max_kl": 1.0}, r"max_kl needs a reference"),
        ({"save": "best"}, r"which rl has not"),
        ({"algorithm": "online_dpo", "entropy_weight": 0.1}, r"entropy_weight: not with pair_loss"),
        ({"algorithm": "online_dpo", "reward_scale": "decoupled"}, r"reward_scale: not with pair_loss"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(settings, message):
    with pytest.raises(ConfigError, match=message):
        RLConfig.parse({"data": ["prompts.jsonl"], **SETTINGS, **settings}, "rl")


def test_names_of_the_registries_are_checked_before_anything_runs():
    path = Path(__file__).parents[2] / "examples" / "arithmetic" / "recipe.yaml"
    stage = load_recipe(str(path), allow_code=True).stage("rl")
    stage.spec.check(stage.config)
    for setting, word in (("advantage", "advantage"), ("aggregation", "aggregation"), ("correction", "off-policy correction")):
        with pytest.raises(ConfigError, match=f"there is no {word} 'grop'"):
            stage.spec.check(stage.config.with_changes(**{setting: "grop"}))


def test_a_preset_gives_way_to_what_is_given():
    config = RLConfig.parse({"data": ["p.jsonl"], "algorithm": "dapo", "clip_high": 0.5}, "rl")
    assert (config.clip_low, config.clip_high, config.aggregation, config.dynamic_sampling) == (0.2, 0.5, "token_mean", True)
    assert config.with_changes(steps=3).clip_high == 0.5
