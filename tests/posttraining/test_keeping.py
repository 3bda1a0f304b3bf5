"""The better of two models: a stage that makes its model worse ends with the one it started from, and says so."""

import json
from random import Random

import pytest
import torch
from safetensors.torch import load_file

from bessemer.core.errors import ConfigError
from bessemer.core.report import StageReport
from bessemer.core.stage import ItemScore
from bessemer.model.adapters.folder import read_adapter
from bessemer.model.adapters.trained import merged
from bessemer.model.storage.folder import load_model
from bessemer.posttraining.preference.config import PreferenceConfig
from bessemer.posttraining.preference.stage import preference
from bessemer.posttraining.rewards.config import RewardConfig
from bessemer.posttraining.rl.config import RLConfig
from bessemer.posttraining.rl.stage import rl
from bessemer.posttraining.sft.config import SFTConfig
from bessemer.posttraining.sft.stage import sft
from bessemer.posttraining.specs import STAGES
from bessemer.training.keeping import MeasuredItems, compare_models
from tests.cases import slow
from tests.posttraining.test_formats import said
from tests.training.conftest import RecordedProgress

SETTINGS = {
    "steps": 6,
    "batch_size": 4,
    "context_length": 128,
    "dtype": "float32",
    "compile": False,
    "validation_share": 0.4,
    "diagnostics_every": 0,
    "threads": 1,
}
#: Learning rates that learn, and that destroy.
GOOD, BAD = 2e-3, 1.0
PREFERENCE = {stage.kind: stage for stage in STAGES}["preference"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pairs whose answer in capitals is preferred, and noise: pairs of which either is, and answers of any letters, from which
    nothing can be learnt for those held out. Prompts with a reward of the letter e."""
    folder = tmp_path_factory.mktemp("data")
    words = ["stone", "river", "cloud", "apple", "horse", "table", "light", "winter", "bread", "paper", "green", "music"]
    rows = [
        {"prompt": [said("user", f"Say {a} {b}.")], "chosen": f"{a} {b}".upper(), "rejected": f"{a} {b}"}
        for a in words
        for b in words[:4]
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    random = Random(1)
    sides = [random.sample([row["chosen"], row["rejected"]], 2) for row in rows]
    noise = [row | dict(zip(("chosen", "rejected"), each, strict=True)) for row, each in zip(rows, sides, strict=True)]
    (folder / "noise.jsonl").write_text("".join(json.dumps(row) + "\n" for row in noise), encoding="utf-8")
    letters = ["".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=20)) for _ in rows]
    answered = [
        {"prompt": row["prompt"], "completion": [said("assistant", text)]} for row, text in zip(rows, letters, strict=True)
    ]
    (folder / "letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answered), encoding="utf-8")
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": row["rejected"]}) + "\n" for row in rows), encoding="utf-8"
    )
    (folder / "rewards.py").write_text(
        "def letters(completions, **kwargs):\n    return [text.count('e') / 8 for text in completions]\n", encoding="utf-8"
    )
    return folder


def run_pairs(model_folder, data, out, learning_rate, progress=None, tasks=None, of="pairs", **changes):
    out.mkdir(exist_ok=True)
    settings = {"data": [f"{of}.jsonl"], "keep_better": True, **SETTINGS, "learning_rate": learning_rate, **changes}
    config = PreferenceConfig.parse(settings, "preference")
    return preference(config, model_folder, out, seed=3, device="cpu", folder=data, progress=progress, tasks=tasks)


def weights(folder):
    return load_file(folder / "model.safetensors")


def are_equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("one_thread")
def test_a_stage_that_makes_its_model_worse_ends_with_the_one_before_and_says_so(model_folder, data, tmp_path):
    progress = RecordedProgress()
    metrics = run_pairs(model_folder, data, tmp_path / "out", BAD, progress, of="noise")
    assert metrics["kept"] == "the model before"
    assert are_equal(weights(tmp_path / "out" / "model"), weights(model_folder))
    assert not are_equal(weights(tmp_path / "out" / "model-trained"), weights(model_folder))
    (measure,) = metrics["comparison"]
    # the policy is the reference before the first step
    assert measure["before"] == pytest.approx(0.6931, abs=1e-4) and measure["after"] > 1 and measure["interval"][1] < 0
    assert any("worse than the model before: held-out loss 0.6931 →" in line for line in progress.lines)
    line = PREFERENCE.summary_line(metrics)
    assert line.endswith("worse than before on held-out loss: the model before is kept")
    stage = StageReport(name="preference", kind="preference", metrics=metrics, folder=tmp_path / "out")
    assert "the model before is kept" in PREFERENCE.sentences(stage)[0]
    heading, text, table = PREFERENCE.report(stage).parts[1:4]
    assert heading.text.startswith("Before and after") and "the model before is kept" in text.text and len(table.rows) == 1


@pytest.mark.usefixtures("one_thread")
def test_a_stage_that_learns_keeps_what_it_would_have_without_a_comparison(model_folder, data, tmp_path):
    metrics = run_pairs(model_folder, data, tmp_path / "compared", GOOD)
    run_pairs(model_folder, data, tmp_path / "plain", GOOD, keep_better=None)
    assert metrics["kept"] == "the trained model" and metrics["comparison"][0]["difference"] > 0
    assert are_equal(weights(tmp_path / "compared" / "model"), weights(tmp_path / "plain" / "model"))
    assert not (tmp_path / "compared" / "model-trained").exists()


@pytest.mark.usefixtures("one_thread")
def test_a_run_that_is_stopped_while_it_compares_ends_alike_when_it_is_resumed(model_folder, data, tmp_path):
    out = tmp_path / "out"
    first = run_pairs(model_folder, data, out, BAD, of="noise")
    # as a kill between the two renamings leaves it
    (out / "model").rename(out / "model-before")
    again = run_pairs(model_folder, data, out, BAD, of="noise")
    assert again["comparison"] == first["comparison"] and are_equal(weights(out / "model"), weights(model_folder))
    assert not (out / "model-before").exists() and (out / "model-trained").is_dir()


class TaskOfWeights:
    """Twelve items that the model before has right, and one whose embeddings have moved has wrong."""

    def __init__(self, model_folder):
        self._before = load_model(model_folder).embed_tokens.weight

    def check(self, tokenizer, context_length):
        pass

    def item_scores(self, model, tokenizer):
        is_right = torch.equal(model.embed_tokens.weight, self._before)
        return {"arithmetic": {str(item): ItemScore(float(is_right or item == 0)) for item in range(12)}}


@pytest.mark.usefixtures("one_thread")
def test_a_task_that_gets_worse_counts_however_well_the_stage_learns(model_folder, data, tmp_path):
    asked = []

    def open_tasks(names, folder, limit):
        asked.append((names, folder, limit))
        return TaskOfWeights(model_folder)

    metrics = run_pairs(model_folder, data, tmp_path / "out", GOOD, tasks=open_tasks, keep_better=["sums"])
    assert asked == [(["sums"], None, 500)] and metrics["kept"] == "the model before"
    by_name = {measure["name"]: measure for measure in metrics["comparison"]}
    assert by_name["arithmetic"]["worse"] and not by_name["held-out loss"]["worse"]
    assert by_name["arithmetic"]["after"] == pytest.approx(1 / 12)
    kept = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert kept["items"]["arithmetic"]["after"] == {"0": 1.0} | {str(item): 0.0 for item in range(1, 12)}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("merge", [slow(True), False])
def test_an_adapter_that_makes_a_model_worse_becomes_one_that_changes_nothing(merge, model_folder, data, tmp_path):
    settings = {"data": ["letters.jsonl"], "keep_better": True, **SETTINGS, "learning_rate": 30 * BAD}
    config = SFTConfig.parse({**settings, "adapter": {"rank": 4, "merge": merge}}, "sft")
    out = tmp_path / "out"
    out.mkdir()
    assert sft(config, model_folder, None, out, seed=3, device="cpu", folder=data)["kept"] == "the model before"
    base = load_model(model_folder)
    for folder, is_same in ((out / "adapter", True), (out / "adapter-trained", False)):
        assert are_equal(merged(base, read_adapter(folder, base)).state_dict(), base.state_dict()) is is_same
    assert (out / "model").exists() is merge
    if merge:
        assert are_equal(weights(out / "model"), weights(model_folder))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("confidence", [0.95, 0.0])
def test_rewards_of_prompts_held_out_are_compared_in_rl(confidence, model_folder, data, tmp_path):
    settings = {key: value for key, value in SETTINGS.items() if key not in ("batch_size", "compile")}
    settings |= {"batch_size": 16, "group_size": 4, "max_tokens": 8, "steps": 3, "evaluate_every": 100, "learning_rate": 1e-3}
    config = RLConfig.parse(
        {"data": ["prompts.jsonl"], "rewards": ["rewards.py:letters"], "keep_better": {"confidence": confidence}, **settings},
        "rl",
    )
    metrics = rl(config, model_folder, tmp_path, seed=3, device="cpu", folder=data)
    (measure,) = metrics["comparison"]
    # the same completions as those of the validations before and at the end
    assert measure["before"] == pytest.approx(metrics["validation_reward_before"])
    assert measure["after"] == pytest.approx(metrics["validation_reward"])
    is_worse = measure["interval"][1] < 0 if confidence else measure["difference"] < 0
    assert (metrics["kept"] == "the model before") is measure["worse"] is is_worse


def test_differences_are_paired_by_item_and_by_cluster():
    before = {"task": MeasuredItems({item: ItemScore(item / 10, "one" if item < 5 else None) for item in range(8)})}
    after = {"task": MeasuredItems({item: ItemScore(item / 10 - 0.1 - item % 2 / 50) for item in range(1, 9)})}
    (found,) = compare_models(before, after)
    # items 1 to 7: the mean of −0.1 and −0.12; items 1 to 4 are one cluster
    assert found.difference.mean == pytest.approx(-(3 * 0.1 + 4 * 0.12) / 7) and found.difference.clusters == 4
    assert found.is_worse(0.95)
    noise = {"task": MeasuredItems({item: ItemScore(item / 10 + (-1) ** item / 10 - 0.01) for item in range(8)})}
    (found,) = compare_models(before, noise)
    assert not found.is_worse(0.95) and found.is_worse(0.0)
    with pytest.raises(ConfigError, match="no item has a score of both"):
        compare_models(before, {"task": MeasuredItems({})})


def test_settings_that_compare_nothing_are_refused_and_those_of_other_runs_keep_their_key(model_folder, data, tmp_path):
    with pytest.raises(ConfigError, match="nothing to compare the models on"):
        run_pairs(model_folder, data, tmp_path / "out", GOOD, validation_share=0)
    with pytest.raises(ConfigError, match="held_out: false leaves nothing"):
        SFTConfig.parse({"keep_better": {"held_out": False}}, "sft")
    with pytest.raises(ConfigError, match="a reward model starts from one that has no scores"):
        RewardConfig.parse({"data": ["pairs.jsonl"], "keep_better": True}, "reward")
    assert "keep_better" not in SFTConfig.parse({}, "sft").output_settings()
    assert SFTConfig.parse({"keep_better": "sums"}, "sft").output_settings()["keep_better"]["tasks"] == ["sums"]
