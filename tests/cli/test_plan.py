import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import planning
from bessemer.model.config import preset_config
from bessemer.model.decoder import Decoder
from bessemer.model.storage.folder import save_model
from bessemer.pipeline.planning import training_plan
from bessemer.pipeline.recipe import load_recipe, shipped_recipes
from bessemer.scaling.hardware import find_card
from bessemer.scaling.job import PlannedJob
from bessemer.scaling.planner import configured_plan
from tests.cases import slow_but
from tests.cli.test_main import bessemer, one_error
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer

pytestmark = pytest.mark.usefixtures("standard_library")

#: Of each shipped recipe the number of its cards and their kind; those of `planning.RECIPES` are for GPUs. Not of those that
#: import a model, which need not be here.
MAKERS = [name for name, path in shipped_recipes().items() if "\nimport:" not in path.read_text(encoding="utf-8")]
CARDS = dict.fromkeys(MAKERS, (1, "cpu")) | {name: (gpus, card) for name, (gpus, card, _) in planning.RECIPES.items()}


@pytest.fixture
def compiler(monkeypatch):
    """A C++ compiler, as the machines have that the recipes are for."""
    monkeypatch.setattr("bessemer.training.config.cxx_compiler", lambda: "c++")


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


@pytest.mark.parametrize("name", sorted(set(CARDS) - {"long-context", "continue"}))  # which start from a model
def test_every_shipped_recipe_can_be_planned(name):
    asked = training_plan(name)
    assert asked.tokens or asked.minutes
    assert asked.settings.context_length <= asked.model.max_position_embeddings


def test_a_recipe_s_vocabulary_is_its_tokenizer_s():
    assert training_plan("1b").model.vocab_size == 65_536
    assert training_plan("quickstart", ["tokenize.vocab_size=8192"]).model.vocab_size == 8192


def test_minutes_become_tokens_at_the_predicted_speed(capsys):
    plan = json.loads(bessemer(capsys, "plan", "quickstart", "--gpu", "cpu", "--json")[1])
    assert plan["plans"][0]["days"] * 24 * 60 == pytest.approx(load_recipe("quickstart").stage("pretrain").config.minutes)


@pytest.fixture
def quickstart_model(tmp_path, monkeypatch):
    """A folder with a model where `long-context` looks for the quickstart's, and a model and text where `continue` does."""
    monkeypatch.chdir(tmp_path)
    config = preset_config("qwen3-1m", training_plan("quickstart").model.vocab_size).with_changes(max_position_embeddings=256)
    save_model(Decoder(config), tmp_path / "runs/quickstart/stages/pretrain", tokenizer=None)
    save_model(
        Decoder(config.with_changes(vocab_size=VOCAB_SIZE)), tmp_path / "base", tokenizer=write_small_tokenizer(tmp_path / "t")
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("Steel is an alloy.", encoding="utf-8")


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name", slow_but(["quickstart", "1b", "moe-1t", "long-context", "continue"], sorted(CARDS)))
def test_a_shipped_recipe_runs_dry_on_its_cards(capsys, monkeypatch, quickstart_model, name):
    monkeypatch.setenv("WORLD_SIZE", str(CARDS[name][0]))
    monkeypatch.setenv("RANK", "0")
    code, out, err = bessemer(capsys, "run", name, "--dry-run")
    assert code == 0, err
    assert len(out.splitlines()) == len(load_recipe(name).stages)


@pytest.mark.parametrize("name", sorted(CARDS))
def test_a_shipped_recipe_fits_its_cards_with_the_layout_it_has(quickstart_model, name):
    gpus, card = CARDS[name]
    asked = training_plan(name)
    plan = configured_plan(PlannedJob(asked.model, asked.settings, find_card(card)), gpus)
    assert plan.memory.peak <= plan.job.card.usable_memory


@pytest.mark.parametrize("name", sorted(planning.RECIPES))
def test_a_recipe_for_gpus_names_the_plan_of_its_cards(name):
    gpus, card = CARDS[name]
    assert f"`bessemer plan {name} --gpus {gpus} --gpu {card}`" in shipped_recipes()[name].read_text(encoding="utf-8")


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("processes", [8, 16, 64])
def test_the_recipe_1b_runs_on_one_machine_of_8_gpus_and_on_several(capsys, monkeypatch, tmp_path, processes):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("RANK", "0")
    assert bessemer(capsys, "run", "1b", "--dry-run")[0] == 0


def test_a_recipe_for_one_card_is_planned_as_it_is_beside_the_best_layout(capsys):
    asked = json.loads(bessemer(capsys, "plan", "125m", "--json")[1])["asked"]
    assert asked["settings"] == {"parallel": {}, "micro_batch_size": 16, "activation_checkpointing": "none"}
