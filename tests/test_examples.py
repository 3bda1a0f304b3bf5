"""Every file of `examples/` runs as it is, in an empty folder."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bessemer
from bessemer.cli.main import main
from bessemer.core.usercode import load_user_function
from bessemer.pipeline.recipe import load_recipe
from bessemer.posttraining.data.examples import read_conversations
from bessemer.posttraining.sft.finetune_inputs import find_columns
from tests.test_packaging import package_of, packages

EXAMPLES = Path(__file__).parents[1] / "examples"
SOURCE = str(Path(bessemer.__file__).parents[1])


def run(folder: Path, *words: str, path: Path | None = None) -> str:
    """What a program of ours prints in a folder; path: installed packages beside those of this environment."""
    places = os.pathsep.join([SOURCE, *([str(path)] if path else [])])
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": places},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    """A folder in which `tiny_model.py` ran."""
    folder = tmp_path_factory.mktemp("examples")
    printed = run(folder, str(EXAMPLES / "tiny_model.py"))
    assert "pretrain" in printed and "parameters" in printed
    return folder


@pytest.fixture
def run_here(tmp_path, monkeypatch, capsys):
    """What a file of `examples/` prints, run in this process, which has loaded the libraries."""

    def run_here(name: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_here


def test_a_page_without_its_menu(run_here):
    printed = run_here("extract_page.py")
    assert "The converter stands" in printed and "Privacy" not in printed


def test_a_table_is_refined(run_here):
    assert "2 of 5 kept" in run_here("refine_table.py")


@pytest.mark.slow
def test_the_engine_generates(tiny_model):
    assert "'hot'" in run(tiny_model, str(EXAMPLES / "engine.py"))


# by default the tutorial with an open model shows the same commands
@pytest.mark.slow
def test_a_quantised_model_is_served(tiny_model):
    run(tiny_model, str(EXAMPLES / "quantise_and_serve.py"))
    assert (tiny_model / "small" / "config.json").exists()


def kept(folder: Path) -> list[str]:
    import pyarrow.dataset as parquet

    return parquet.dataset(folder / "stages" / "select" / "documents").to_table()["text"].to_pylist()


def test_a_recipe_has_a_filter_of_its_own(tmp_path, monkeypatch):
    folder = tmp_path / "own"
    shutil.copytree(EXAMPLES / "own_filter", folder)
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as refused:
        main(["run", "recipe.yaml"])
    assert refused.value.code == 2
    with pytest.raises(SystemExit) as stop:
        main(["run", "recipe.yaml", "--allow-code"])
    assert not stop.value.code
    assert [text[:11] for text in kept(folder / "runs" / "own-filter")] == ["The furnace"]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "shown"), [("recipe.yaml", "equal groups"), ("ppo.yaml", "Reward that the critic expects")])
def test_a_model_is_rewarded_for_right_sums(tmp_path, monkeypatch, recipe, shown):
    folder = tmp_path / "arithmetic"
    shutil.copytree(EXAMPLES / "arithmetic", folder)
    monkeypatch.chdir(folder)
    few = ["pretrain.steps=2", "rl.steps=2", "rl.warmup_steps=0", "rl.batch_size=8", "rl.group_size=4"]
    with pytest.raises(SystemExit) as stop:
        main(["run", recipe, "--allow-code", "--name", "arithmetic", *few, "rl.tasks_limit=8", "rl.tasks_every=2"])
    assert not stop.value.code
    report = (folder / "runs" / "arithmetic" / "report.html").read_text(encoding="utf-8")
    assert "Reinforcement learning" in report and "Completions along the way" in report and shown in report


@pytest.mark.slow
def test_a_model_is_told_right_sums(tmp_path, monkeypatch):
    folder = tmp_path / "arithmetic"
    shutil.copytree(EXAMPLES / "arithmetic", folder)
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stop:
        few = ["pretrain.steps=2", "sft.steps=2", "sft.task_items=20"]
        main(["run", "tuning.yaml", "--allow-code", "--name", "tuned", *few])
    assert not stop.value.code
    stages = folder / "runs" / "tuned" / "stages"
    assert (stages / "sft" / "model").is_dir() and not (stages / "rl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["recipe.yaml", "direct.yaml"])
def test_a_model_learns_to_think_before_it_answers(tmp_path, monkeypatch, capsys, recipe):
    folder = tmp_path / "reasoning"
    shutil.copytree(EXAMPLES / "reasoning", folder)
    monkeypatch.chdir(folder)
    few = ["sft.steps=2", "rl.steps=2", "rl.warmup_steps=1", "rl.batch_size=8", "rl.group_size=4", "rl.tasks_limit=4"]
    with pytest.raises(SystemExit) as stop:
        main(["run", recipe, "--allow-code", "--name", "reasoning", *few])
    assert not stop.value.code
    report = (folder / "runs" / "reasoning" / "report.html").read_text(encoding="utf-8")
    assert "Reinforcement learning" in report and "Completions along the way" in report
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "reasoning", "--tasks", "sums_held_out.yaml", "--limit", "4", "--thinking-budget", "8"])
    assert not stop.value.code and "sums_held_out" in capsys.readouterr().out
    assert "budget  8" in run(folder, "budgets.py", "runs/reasoning/stages/rl/model", "4")


def test_thinking_of_the_example_is_right_and_of_every_third_cut():
    rows = list(load_user_function("worked.py:worked", EXAMPLES / "reasoning")())
    whole = 0
    for row in rows:
        question, answer = (message["content"] for message in row["messages"])
        thought, _, said = answer.removeprefix("<think>\n").partition("</think>\n\n")
        assert int(said) == sum(map(int, question.removesuffix(" =").split(" + ")))
        steps = re.findall(r"(\d+)\+(\d+)=(\d+)[,\n]", thought)
        assert all(int(left) + int(right) == int(total) for left, right, total in steps)
        if thought.endswith("\n") and len(steps) == 5:
            assert said == str(int(f"{steps[4][2]}{int(steps[1][2]) % 10}"))
            whole += 1
    assert whole == 2 * len(rows) // 3


@pytest.mark.slow
def test_a_small_model_learns_from_a_larger_one(tmp_path, monkeypatch):
    folder = tmp_path / "distillation"
    shutil.copytree(EXAMPLES / "distillation", folder)
    monkeypatch.chdir(folder)
    few = [f"{stage}.steps=2" for stage in ("teacher", "student", "distillation", "on_policy")]
    with pytest.raises(SystemExit) as stop:
        main(["run", "recipe.yaml", "--name", "distillation", *few, "on_policy.batch_size=4", "on_policy.evaluate_every=2"])
    assert not stop.value.code
    report = (folder / "runs" / "distillation" / "report.html").read_text(encoding="utf-8")
    assert "Distillation" in report and "Bits per byte of held-out text" in report


def copied(name: str, place: Path) -> Path:
    """A copy of an example's folder, as deep in `place` as it lies in the repository."""
    return Path(shutil.copytree(EXAMPLES / name, place / "examples" / name))


def bits_by_source(run: Path, model: str) -> dict[str, float]:
    results = json.loads((run / "stages" / "evaluate" / "results.json").read_text(encoding="utf-8"))
    return {row["name"]: row["bits_per_byte"][model] for row in results["bits_per_byte_by"]["source"]}


@pytest.mark.slow
def test_a_checkout_becomes_a_model_that_fills_in_the_middle(tmp_path, monkeypatch):
    folder = copied("coding_assistant", tmp_path)
    # a part of the checkout, of which `assistant` is held out
    for package in ("assistant", "inspection"):
        shutil.copytree(Path(SOURCE, "bessemer", package), tmp_path / "src" / "bessemer" / package)
    monkeypatch.chdir(folder)
    run(folder, "questions.py")
    assert len(read_conversations(folder / "questions.jsonl")) > 20
    few = ["pretrain.steps=2", "sft.steps=2", "pretrain.evaluate_tokens=2000", "evaluate.max_tokens=2000"]
    with pytest.raises(SystemExit) as stop:
        main(["run", "recipe.yaml", "--name", "coding-assistant", *few])
    assert not stop.value.code
    printed = run(folder, "fill_in.py")
    assert all(f"{order}: " in printed for order in ("behind the text before", "after it, first", "nothing after it"))


@pytest.mark.slow
def test_tickets_become_a_bot(tmp_path, monkeypatch):
    folder = copied("support_bot", tmp_path)
    shutil.copy(EXAMPLES / "tickets.csv", tmp_path / "examples")
    monkeypatch.chdir(folder)
    few = ["pretrain.steps=2", "sft.steps=2", "sft.evaluate_every=1", "evaluate.max_tokens=2000", "evaluate.questions=4"]
    with pytest.raises(SystemExit) as stop:
        main(["run", "recipe.yaml", "--name", "support-bot", *few])
    assert not stop.value.code
    made = folder / "runs" / "support-bot" / "stages" / "sft" / "conversations"
    trained, held_out = (len(read_conversations(made / f"{split}.jsonl")) for split in ("train", "validation"))
    assert trained + held_out == 200 and 10 <= held_out <= 30


@pytest.mark.slow
def test_a_base_reads_a_domain_and_what_it_forgets_is_measured(tmp_path, monkeypatch):
    folder = copied("domain", tmp_path)
    (tmp_path / "docs").mkdir()
    for page in (EXAMPLES.parent / "docs").glob("*.md"):
        shutil.copy(page, tmp_path / "docs")
    monkeypatch.chdir(folder)
    few = ["pretrain.steps=2", "continued.steps=4", "sft.steps=2"]
    with pytest.raises(SystemExit) as stop:
        main(["run", "recipe.yaml", "--name", "domain", *few])
    assert not stop.value.code
    by_source = {model: bits_by_source(folder / "runs" / "domain", model) for model in ("pretrain", "continued", "sft")}
    assert all(found.keys() == {"python_docs", "domain"} for found in by_source.values())
    assert by_source["continued"]["domain"] < by_source["pretrain"]["domain"]


@pytest.mark.slow
def test_an_installed_package_adds_a_filter(tmp_path):
    folder, site = tmp_path / "plugin", tmp_path / "site"
    shutil.copytree(EXAMPLES / "plugin", folder)
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    run(folder, *pip, "--target", str(site), ".")
    run(folder, "-m", "bessemer", "run", "recipe.yaml", path=site)
    assert kept(folder / "runs" / "shouting") == ["The furnace is hot. Stand back."]


def test_the_tickets_are_200_questions_with_answers():
    columns = find_columns(EXAMPLES / "tickets.csv", None, None)
    assert columns == ("ticket", "answer")
    assert len(read_conversations(EXAMPLES / "tickets.csv", columns)) == 200


def needs(text: str) -> str | None:
    """What the head of an example says that it needs: its extras, and packages beside them."""
    found = re.search(r"Needs the extras? (\w+(?:, \w+)*)", text)
    return None if found is None else found[1] + (", `openai`" if "`pip install openai`" in text else "")


def test_the_list_installs_what_the_head_of_each_example_needs():
    rows = re.findall(
        r"^\| \[`([^`]+)`\]\(\S+\) \| [^|]+ \| `pip install '\.\[([a-z,]+)\]'( openai)?` \|",
        (EXAMPLES / "README.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    listed = {name: {*extras.split(","), *(["`openai`"] if client else [])} for name, extras, client in rows}
    assert len(listed) == 14 and listed.pop("tickets.csv") == {"train"}
    for name, installed in listed.items():
        head = EXAMPLES / name / ("recipe.yaml" if name.endswith("/") else "")
        needed = set((needs(head.read_text(encoding="utf-8")) or "").split(", "))
        # two of them take a model that another example makes, with `data`
        assert needed <= installed <= needed | {"data"}, name


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("recipe.yaml")), ids=lambda path: path.parent.name)
def test_the_extras_that_a_recipe_names_bring_what_its_stages_need(path, monkeypatch):
    extras = needs(path.read_text(encoding="utf-8")).split(", ")
    installed = set().union(*map(packages, extras))
    monkeypatch.chdir(path.parent)
    if path.parent.name == "plugin":
        path = EXAMPLES / "own_filter" / "recipe.yaml"  # of the same stages, and of no package that has to be installed
    for stage in load_recipe(str(path), allow_code=True).stages:
        for module in stage.spec.packages(stage.config):
            assert package_of(module) in installed, f"{stage.name} needs {module}"


def test_every_example_is_in_the_list_and_runs_here():
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    names = {path.name for path in EXAMPLES.iterdir() if path.name not in ("README.md", "__pycache__", "runs")}
    tested = Path(__file__).read_text(encoding="utf-8")
    assert all(f"({name})" in listed and name in tested for name in names), names
