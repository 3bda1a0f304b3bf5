"""CONTRIBUTING is followed literally, on a copy of the package: each of its recipes works."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.literate import Block, blocks

ROOT = Path(__file__).parents[1]
#: For each recipe the tests that it ends in.
RECIPES = {
    "Add a sampling parameter": ["tests/inference/test_top_n_sigma.py"],
    "Add a model family": [
        "tests/model/test_families.py::test_logits_equal_those_of_transformers[seed_oss]",
        "tests/model/test_families.py::test_cached_decoding_equals_that_of_transformers[seed_oss]",
        "tests/model/test_families.py::test_every_family_is_tested",
        "tests/model/test_gguf.py::test_every_family_is_tested_or_refused_by_name",
    ],
    "Add an attention variant": ["tests/model/test_retention.py"],
    "Add an optimizer": ["tests/training/test_signum.py", "tests/training/test_optimizers.py"],
    "Add a filter": ["tests/data/test_shouting.py"],
    "Add a source": ["tests/data/sources/test_todo.py"],
    "Add a loss of preferences": ["tests/posttraining/test_exo_margin.py"],
    "Add an evaluation task": ["tests/tasks/test_differences.py"],
    "Add an endpoint": ["tests/serving/test_load_endpoint.py"],
    "Add a page": ["tests/webapp/test_about.py"],
    "Add a command": ["tests/cli/test_words_command.py"],
}


def section(heading: str) -> str:
    """What stands below a heading of the second level."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE)[1]


def apply(block: Block, root: Path) -> None:
    """Write the file that a block is, or change the file as it says."""
    path = root / block.title
    if block.language != "diff":
        assert not path.exists(), f"{block.title} is there already"
        path.write_text(block.text, encoding="utf-8")
        return
    text = path.read_text(encoding="utf-8")
    for hunk in re.split(r"^@@\n", block.text, flags=re.MULTILINE):
        text = changed(text, hunk, block.title)
    path.write_text(text, encoding="utf-8")


def changed(text: str, hunk: str, name: str) -> str:
    """The text after one change: lines with a space or a minus are found, those with a minus go, those with a plus come."""
    lines = [(line[:1], line[1:] + "\n") for line in hunk.splitlines()]
    found = "".join(line for kind, line in lines if kind in " -")
    after = "".join(line for kind, line in lines if kind in " +")
    assert text.count(found) == 1, f"{name}: {text.count(found)} places are\n{found}"
    return text.replace(found, after)


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The project's package and tests with every change that CONTRIBUTING shows."""
    root = tmp_path_factory.mktemp("contributing")
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    page = root / "section.md"
    for heading in RECIPES:
        page.write_text(section(heading), encoding="utf-8")
        found = [block for block in blocks(page) if block.title]
        assert found, heading
        for block in found:
            apply(block, root)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("heading", RECIPES)
def test_the_recipe_works(copy, heading):
    path = os.pathsep.join([str(copy / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *RECIPES[heading]]
    done = subprocess.run(
        command, cwd=copy, capture_output=True, encoding="utf-8", env=os.environ | {"PYTHONPATH": path}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "heading",
    [pytest.param(heading, marks=pytest.mark.slow) if heading == "Add a model family" else heading for heading in RECIPES],
)
def test_the_files_that_a_recipe_names_are_there(heading):
    for name in re.findall(r"`((?:docs|tests|src|examples)/[\w/.-]+|CHANGELOG\.md)`", section(heading)):
        assert (ROOT / name).exists() or f'title="{name}"' in section(heading), name
