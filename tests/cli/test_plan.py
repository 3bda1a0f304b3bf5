import json

import pytest

from bessemer.pipeline.planning import planned
from bessemer.pipeline.recipe import load_recipe, shipped_recipes
from tests.cli.test_main import bessemer, one_error


def test_a_recipe_s_plan_says_memory_time_cost_and_the_best_layout(capsys):
    code, out, err = bessemer(capsys, "plan", "1b", "--gpus", "8", "--gpu", "h100", "--price", "2")
    assert code == 0, err
    for words in ("1b on 8 × h100", "$2 an hour each", "data_shard: 8", "optimizer states", "MFU", "as the recipe has it"):
        assert words in out, words


def test_a_preset_s_plan_is_json_whose_kinds_of_memory_and_seconds_add_up(capsys):
    _, out, _ = bessemer(capsys, "plan", "qwen3-0.6b", "pretrain.batch_size=64", "--gpus", "8", "--layouts", "2", "--json")
    plan = json.loads(out)
    assert len(plan["plans"]) == 2 and plan["gpus"] == 8 and plan["price_is_assumed"]
    seconds = plan["plans"][0]["seconds"]
    hidden = seconds["communication, hidden"]
    assert sum(seconds.values()) - seconds["step"] - hidden == pytest.approx(seconds["step"])
    memory = plan["plans"][0]["memory"]
    assert memory["weights"] < memory["peak"] <= sum(memory.values()) - memory["peak"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("qwen3-1mm",), "did you mean 'qwen3-1m'?"),
        (("quickstart", "--gpu", "h1000"), "did you mean 'h100'?"),
        (("qwen3-8b", "--gpu", "rtx4090"), "does not fit 1 × rtx4090"),
        (("qwen3-1m", "tokenize.vocab_size=9"), "an override is model.KEY=VALUE or pretrain.KEY=VALUE"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, words):
    code, _, err = bessemer(capsys, "plan", *arguments)
    assert code == 2 and words in one_error(err)


@pytest.mark.parametrize("name", sorted(set(shipped_recipes()) - {"long-context"}))  # which starts from a run's model
def test_every_shipped_recipe_can_be_planned(name):
    asked = planned(name)
    assert asked.tokens or asked.minutes
    assert asked.settings.context_length <= asked.model.max_position_embeddings


def test_a_recipe_s_vocabulary_is_its_tokenizer_s():
    assert planned("1b").model.vocab_size == 65_536
    assert planned("quickstart", ["tokenize.vocab_size=8192"]).model.vocab_size == 8192


def test_minutes_become_tokens_at_the_predicted_speed(capsys):
    plan = json.loads(bessemer(capsys, "plan", "quickstart", "--gpu", "cpu", "--json")[1])
    assert plan["plans"][0]["days"] * 24 * 60 == pytest.approx(load_recipe("quickstart").stage("pretrain").config.minutes)
