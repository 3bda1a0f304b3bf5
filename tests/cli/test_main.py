import io
import json
import os
import pydoc
import re
import shlex
import subprocess
import sys
from collections import Counter

import pytest
import typer

import bessemer as bessemer_package
from bessemer.cli.main import app, main


def bessemer(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    return int(exit_.value.code or 0), out, err


def one_error(err: str) -> str:
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("words", "environment", "expected"),
    [
        (["--help"], {}, "Use a model"),
        ([], {"_BESSEMER_COMPLETE": "complete_bash", "COMP_WORDS": "bessemer serv", "COMP_CWORD": "1"}, "serve"),
    ],
    ids=["help", "completion"],
)
def test_help_and_completion_load_none_of_the_heavy_libraries(words, environment, expected):
    code = (
        f"import sys\nfrom bessemer.cli.main import main\n"
        f"try: main({words})\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'daft', 'pyarrow', 'numpy', 'tokenizers', 'matplotlib', 'fastapi', 'transformers'}\n"
        # typer reads a value of any option by pydantic
        f"heavy |= {{'ruamel' if {bool(environment)} else 'pydantic'}}\n"
        "print()\nprint('loaded', sorted(heavy & set(sys.modules)))"
    )
    given = os.environ | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True, env=given)
    assert expected in done.stdout and done.stdout.splitlines()[-1] == "loaded []"


def every_command(command, names=()):
    """A group's commands, and those of groups inside it, itself first."""
    yield names, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from every_command(inner, (*names, name))


def test_every_help_ends_with_examples_that_the_command_takes():
    group = typer.main.get_command(app)
    for names, command in every_command(group):
        first, *others = (command.epilog or "").removeprefix("Example: ").split("\n\n")
        assert first.startswith(" ".join(["bessemer", *names])), f"{names}: {first!r}"
        for line in (first, *others):
            program, *words = shlex.split(line)
            assert program == "bessemer" and len(line) < 90, f"{names}: {line!r}"
            called = group
            while hasattr(called, "commands"):
                called, words = called.commands[words[0]], words[1:]
            called.make_context(line, words)


def test_every_command_stands_in_a_panel_and_no_panel_of_serve_is_long():
    group = typer.main.get_command(app)
    assert all(command.rich_help_panel for command in group.commands.values())
    panels = Counter(
        option.rich_help_panel for option in group.commands["serve"].params if not getattr(option, "hidden", False)
    )
    assert len(panels) >= 6 and max(panels.values()) <= 8


@pytest.mark.parametrize("words", [["chat", "-h"], ["help", "chat"], ["scaling", "fit", "-h"]])
def test_help_is_asked_for_in_three_ways(capsys, words):
    code, out, _ = bessemer(capsys, *words)
    asked = [word for word in words if word not in ("-h", "help")]
    assert code == 0 and out == bessemer(capsys, *asked, "--help")[1]
    assert f"Usage: bessemer {' '.join(asked)}" in out and "Example: bessemer" in out


def test_dir_and_help_of_the_package_show_its_public_names():
    names = set(bessemer_package.__all__)
    assert names <= set(dir(bessemer_package))
    assert all(name.startswith("__") for name in set(dir(bessemer_package)) - names)
    # a long signature is broken behind its bracket since Python 3.13
    shown = re.sub(r"\(\n\s*", "(", pydoc.plain(pydoc.render_doc(bessemer_package)))
    for name in names - {"__version__"}:
        assert re.search(rf"^    {name} ", shown, flags=re.MULTILINE), name
    assert "class Engine(" in shown and "refine(documents" in shown and 'bessemer.run("quickstart")' in shown


def test_importing_bessemer_loads_none_of_the_heavy_libraries():
    code = "import sys, bessemer; dir(bessemer); print(sorted({'torch', 'daft', 'numpy', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True).stdout == "[]\n"


def test_dry_run_checks_a_recipe_without_loading_torch(tmp_path):
    code = (
        "import sys\nfrom bessemer.cli.main import main\n"
        "try: main(['run', 'quickstart', '--dry-run', 'collect=[python_docs]'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "print('loaded', sorted({'torch', 'matplotlib', 'fastapi'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "loaded []"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["frob"], "No such command 'frob'"),
        (["generate"], "Missing argument"),
        (["run", "nothing-like-it"], "there is no recipe 'nothing-like-it'"),
        (["run", "quickstart", "pretrain.learning_rat=1"], "did you mean 'learning_rate'?"),
        (["run", "quickstart", "pretrian.steps=1"], "did you mean 'pretrain'?"),
        (["run", "quickstart", "pretrain.minutes=soon"], "override pretrain.minutes=soon: pretrain.minutes:"),
        (["run", "quickstart", "--until", "pretrian"], "has no stage 'pretrian'; did you mean 'pretrain'?"),
        (["chat", "nothing"], "there is no model 'nothing'"),
        (["chat", "smolm2"], "did you mean 'smollm2'?"),
        (["show", "nothing"], "nothing"),
        (["compare", "a", "b"], "there is no run 'a'"),
        (["clean"], "there are no runs here"),
        (["recipes", "show", "quikstart"], "did you mean 'quickstart'?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    code, _, err = bessemer(capsys, *arguments)
    assert code == 2
    assert expected in one_error(err)
    assert list(tmp_path.iterdir()) == []


COMMANDS_OF_A_MODEL = (
    *(("chat",), ("show",), ("generate", "text"), ("inspect", "text"), ("serve",), ("label", "out"), ("quantize", "out")),
    *(("export", "out", "--format", "gguf"), ("extend", "out", "--token", "x"), ("finetune", "data.csv", "out")),
    ("evaluate", "--tasks", "arithmetic"),
)


@pytest.mark.parametrize("command", COMMANDS_OF_A_MODEL, ids=lambda command: command[0])
def test_every_command_names_the_one_that_fetches_a_model(capsys, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BESSEMER_MODELS", raising=False)
    monkeypatch.setattr("bessemer.model.formats.find_packaged_smollm2", lambda: None)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    for name in ("smollm2", "Qwen/Qwen3-0.6B@main"):
        code, _, err = bessemer(capsys, command[0], name, *command[1:])
        assert code == 2
        assert one_error(err) == f"error: the model {name!r} is not on this machine; to fetch it: bessemer pull {name}"
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = bessemer(capsys, "--debug", "chat", "nothing")
    assert code == 2
    assert "Traceback" in err


def test_init_makes_a_recipe_that_is_valid_and_overwrites_nothing(capsys, tmp_path, monkeypatch):
    code, out, _ = bessemer(capsys, "init", tmp_path / "mine")
    assert code == 0
    assert "bessemer run recipe.yaml --dry-run" in out
    monkeypatch.chdir(tmp_path / "mine")
    from bessemer.pipeline.recipe import load_recipe

    recipe = load_recipe("recipe.yaml")
    assert recipe.name == "mine"
    assert [source.paths for source in recipe.stage("collect").config.sources] == [["data"]]
    code, _, err = bessemer(capsys, "init", tmp_path / "mine")
    assert code == 2
    assert "exists already" in one_error(err)


def test_recipes_are_listed_with_a_description(capsys):
    code, out, _ = bessemer(capsys, "recipes")
    assert code == 0
    assert "quickstart" in out
    assert "ten minutes" in out


def test_clean_removes_what_no_run_links_to_and_nothing_else(capsys, tmp_path, monkeypatch):
    from bessemer.core.store import Store, link

    monkeypatch.chdir(tmp_path)
    store = Store(tmp_path / "runs" / ".store")
    for key in ("kept-1", "stale-2"):
        (store.partial(key)).mkdir(parents=True)
        (store.partial(key) / "file").write_text("x", encoding="utf-8")
        store.publish(key, {})
    store.partial("broken-3").mkdir()
    store.partial("busy-4").mkdir()
    (tmp_path / "runs" / "mine").mkdir()
    link(tmp_path / "runs" / "mine" / "stages" / "kept", store.root / "kept-1")
    with store.lock("busy-4"):
        code, out, _ = bessemer(capsys, "clean", "--dry-run")
        assert "would remove stale-2" in out
        assert (store.root / "stale-2").exists()
        code, out, _ = bessemer(capsys, "clean")
    assert code == 0
    assert sorted(path.name for path in store.root.iterdir() if path.is_dir()) == ["busy-4.partial", "kept-1"]
    assert json.loads((store.root / "kept-1" / "manifest.json").read_text(encoding="utf-8"))["format"] == 1


def test_clean_leaves_what_a_run_published_after_it_looked(capsys, tmp_path, monkeypatch):
    from bessemer.core.store import Store, link
    from bessemer.pipeline import run_folder

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    store, linked_keys = Store(tmp_path / "runs" / ".store"), run_folder.linked_keys

    def publishing_then(runs):
        found = linked_keys(runs)
        if store.find("fresh-5") is None:
            store.partial("fresh-5").mkdir(parents=True)
            with store.lock("fresh-5"):
                link(runs / "mine" / "stages" / "fresh", store.publish("fresh-5", {}).folder)
        return found

    monkeypatch.setattr(run_folder, "linked_keys", publishing_then)
    code, out, _ = bessemer(capsys, "clean")
    assert (code, out) == (0, "0 B freed\n")
    assert store.find("fresh-5") is not None


def test_explain_runs_the_code_of_a_run_only_when_allowed(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "theirs").mkdir(parents=True)
    record = {"format": 1, "name": "theirs", "recipe": {"clean": {"score": ["mine.py:brief"]}}, "stages": {}}
    (tmp_path / "runs" / "theirs" / "run.json").write_text(json.dumps(record), encoding="utf-8")
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\nPath('run').touch()\ndef brief(texts): return [1.0] * len(texts)\n", encoding="utf-8"
    )
    code, _, err = bessemer(capsys, "explain", "a text", "--run", "theirs")
    assert code == 2 and "names code of its own (mine.py:brief)" in one_error(err)
    assert not (tmp_path / "run").exists()
    assert bessemer(capsys, "explain", "a text", "--run", "theirs", "--allow-code")[0] == 0


def test_ctrl_c_says_that_the_command_goes_on(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("bessemer.pipeline.recipe.shipped_recipes", interrupted)
    with pytest.raises(SystemExit, match="130"):
        main(["recipes"])
    assert "stopped; the same command goes on" in capsys.readouterr().err
