"""What the documentation shows is run: every Python block of a page, and every `bessemer` line's command and options."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
#: Pages of the site that its build makes (`docs/tools/hooks.py`).
GENERATED = {ROOT / "docs" / name for name in ("reference/cli.md", "reference/settings.md", "reference/api.md")}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


# tutorials are run as a whole (`test_tutorials.py`)
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python") and page.parent.name != "tutorials"], ids=lambda page: page.name
)
def test_python_blocks_of_the_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__docs__"}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), namespace)


RECIPES = [(page, block) for page in PAGES for block in blocks(page, "yaml") if block.startswith("format: 1")]


@pytest.mark.parametrize(("page", "recipe"), RECIPES, ids=lambda value: getattr(value, "name", "recipe"))
def test_a_recipe_of_the_page_is_one(page, recipe, tmp_path):
    from bessemer.pipeline.recipe import load_recipe

    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    assert load_recipe(str(tmp_path / "recipe.yaml")).stages


def command_lines() -> list[str]:
    lines = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"^```(?:\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
            plain = [line.removeprefix("$ ").partition(" #")[0].strip() for line in block.splitlines()]
            lines += [re.sub(r" [&|>].*", "", line) for line in plain if line.startswith("bessemer ")]
        lines += re.findall(r"`(bessemer [^`…]+)`", text)
    return sorted(set(lines))


@pytest.mark.parametrize("line", command_lines())
def test_commands_in_the_documentation_exist_with_their_options(line):
    import typer

    from bessemer.cli.main import app

    words = shlex.split(line)[1:]
    if words[0].startswith("--"):
        return
    group = typer.main.get_command(app)
    assert words[0] in group.commands, f"{line}: no such command"
    command = group.commands[words[0]]
    if hasattr(command, "commands") and len(words) > 1:
        assert words[1] in command.commands, f"{line}: no such command"
        command = command.commands[words[1]]
    parameters = command.params
    options = {option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in words[1:]:
        if word.startswith("--"):
            assert word.split("=")[0] in options, f"{line}: no option {word}"


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            place = (page.parent / target).resolve()
            assert place.exists() or place in GENERATED, f"{page.name}: {target}"
