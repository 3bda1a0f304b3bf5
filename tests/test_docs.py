"""What the documentation shows is run: every Python block of a page; and every `bessemer` line is parsed by its command."""

import ast
import importlib.util
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import bessemer
from tests.literate import blocks as blocks_that_run
from tests.literate import commands, marked_blocks

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
#: Pages of the site that its build makes (`docs/tools/hooks.py`).
GENERATED = {ROOT / "docs" / name for name in ("reference/cli.md", "reference/api.md")}
#: What a user is led through, by `tests/follow.py` whole.
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs" / "tutorials").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return [block.text for block in blocks_that_run(page) if block.language == language and block.title is None]


@pytest.fixture
def few_python_docs(monkeypatch):
    """The source `python_docs` reads two packages of Python's library, not all."""
    from bessemer.data.sources import python_docs

    files = python_docs._files
    few = ("email/", "json/")
    monkeypatch.setattr(python_docs, "_files", lambda root: [name for name in files(root) if name.startswith(few)])


#: Pages whose programs train a model or build an index: seconds each, for what has tests of its own.
LONG = {
    ROOT / "docs" / name
    for name in (
        "comparing.md",
        "constitution.md",
        "corpus.md",
        "data.md",
        "distillation.md",
        "filters.md",
        "guard.md",
        "index.md",
        "quantisation.md",
        "reasoning.md",
        "retrieval.md",
        "rl.md",
        "rollout-servers.md",
        "scaling_laws.md",
        "scores.md",
        "trainer.md",
    )
}


# tutorials are run as a whole (`test_tutorials.py`)
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow) if page in LONG else page
        for page in PAGES
        if blocks(page, "python") and page.parent.name != "tutorials"
    ],
    ids=lambda page: page.name,
)
@pytest.mark.usefixtures("few_python_docs")
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


def bessemer_commands(line: str) -> list[str]:
    """The `bessemer` commands of a line of shell, without redirections and comments."""
    parts = re.split(r"\s(?:&&|\|\|?|&|;)(?:\s|$)", re.sub(r"\s+#\s.*", "", line))
    return [re.sub(r"\s\d?>.*", "", part).strip() for part in parts if part.strip().startswith("bessemer ")]


def command_lines() -> list[tuple[str, bool]]:
    """Of every page its commands, and whether each is whole: text may name one without what it is applied to."""
    whole, named = set(), set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fence = re.compile(r"^```(?:\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
        for block in fence.findall(text):
            for line in block.replace("\\\n", " ").splitlines():
                whole |= set(bessemer_commands(line.removeprefix("$ ")))
        for inline in re.findall(r"`([^`…]*\bbessemer [^`…]+)`", fence.sub("", text)):
            (whole if page.parent.name == "examples" else named).update(bessemer_commands(inline))
    return sorted({(line, True) for line in whole} | {(line, False) for line in named - whole})


@cache
def command_group() -> Any:
    import typer

    from bessemer.cli.main import app

    return typer.main.get_command(app)


@pytest.mark.parametrize(("line", "whole"), command_lines(), ids=lambda value: value if isinstance(value, str) else "")
def test_commands_in_the_documentation_are_parsed_by_the_real_ones(line, whole):
    words = shlex.split(line)[1:]
    words = words[1:] if words[0] == "--debug" else words
    if words[0].startswith("--"):
        return
    command = command_group()
    path = []
    while hasattr(command, "commands") and words:
        assert words[0] in command.commands, f"{line}: no such command"
        command = command.commands[words[0]]
        path.append(words.pop(0))
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        if word.startswith("--"):
            assert word.split("=")[0] in options, f"{line}: no option {word}"
    if whole:
        # raises what the command line would say: a value that is missing or of another type, a word too many
        command.make_context(" ".join(path), words)


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_python_of_the_guide_compiles_and_imports_what_there_is(page):
    for block in marked_blocks(page):
        if block.language == "python":
            assert missing_names(block.text) == [], f"{page.name}:{block.line}"


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.py")), ids=lambda path: path.name)
def test_an_example_imports_what_there_is(path):
    assert missing_names(path.read_text(encoding="utf-8")) == []


def missing_names(code: str) -> list[str]:
    """What code takes from `bessemer` that is not public: modules and names that are not there, or begin with `_`."""
    missing = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "bessemer":
            defined = names_of(str(node.module))
            missing += [f"{node.module}.{alias.name}" for alias in node.names if alias.name not in defined]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "bessemer":
            missing += [f"bessemer.{node.attr}"] if node.attr not in bessemer.__all__ else []
    return missing


@cache
def names_of(module: str) -> set[str]:
    """The public names of a module of ours, from its source: it is not run."""
    if module == "bessemer":
        return set(bessemer.__all__)
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return set()
    if spec is None or spec.origin is None:
        return set()
    names = set()
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize(
    ("code", "missing"),
    [
        ("import bessemer\nbessemer.run", []),
        ("import bessemer\nbessemer.walk", ["bessemer.walk"]),
        ("from bessemer import Engine, Motor", ["bessemer.Motor"]),
        ("from bessemer.core.statistics import holm", []),
        ("from bessemer.core.statistic import holm", ["bessemer.core.statistic.holm"]),
        ("from bessemer.core.environment import _secret", ["bessemer.core.environment._secret"]),
    ],
)
def test_a_name_that_is_not_there_is_seen(code, missing):
    assert missing_names(code) == missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_installs_from_the_index_what_a_stranger_may_have_put_there(page):
    """The name `bessemer` is not ours there: a page installs from the checkout, `pip install '.[all]'`, or a wheel's file."""
    text = re.sub(r"\./bessemer-\d[\w.]*-py3-none-any\.whl", "FILE", page.read_text(encoding="utf-8"))
    assert not re.search(r"pip install[^`\n]*\bbessemer\b", text)
    assert not re.search(r"uvx --from '?bessemer\b", text)


def test_a_block_of_a_guide_is_followed_or_says_why_not():
    from tests.follow import NEEDS

    for page in GUIDES:
        for block in marked_blocks(page):
            known = block.title or block.language in ("sh", "console", "python") or block.text.startswith("format: 1")
            assert known, f"{page.name}:{block.line}: nobody follows a block of {block.language!r}"
            assert block.mark != "needs" or block.reason in NEEDS, f"{page.name}:{block.line}: needs {block.reason}"
            assert block.language not in ("sh", "console") or commands(block), f"{page.name}:{block.line}: no command"


def test_every_page_of_the_documentation_is_in_its_list():
    listed = (ROOT / "docs" / "index.md").read_text(encoding="utf-8").partition("## All pages")[2]
    names = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert {name for name in names if f"({name})" not in listed} == set()


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            place = (page.parent / target).resolve()
            assert place.exists() or place in GENERATED, f"{page.name}: {target}"
