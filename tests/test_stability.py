"""The stable API: what it is, that a page says so, and what breaks it since the last release."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import bessemer

sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "tools"))

import api_changes

ROOT = Path(__file__).parents[1]

INIT = '_PUBLIC = {"run": ("bessemer.one", "x"), "Engine": ("bessemer.one", "x"), "moved": ("bessemer.one", "x")}\n'
ONE = """
from bessemer.base import Base
def run(recipe, steps=1, *, seed=2): ...
def moved(text): ...
class Engine(Base):
    def generate(self, text, n=1): ...
    def _inner(self): ...
"""
BASE = "class Base:\n    def close(self, wait=True): ...\n"


@pytest.fixture
def released(tmp_path):
    """A repository whose only commit is tagged v0.1.0."""
    pytest.importorskip("griffe", reason="the extra docs is not installed")
    package = tmp_path / "src" / "bessemer"
    (package / "core").mkdir(parents=True)
    sources = {"__init__": INIT, "one": ONE, "base": BASE, "core/__init__": "", "core/stage": "class StageSpec: ...\n"}
    for name, text in (sources | {"core/registry": "class Plugin: ...\nclass Registry: ...\n"}).items():
        (package / f"{name}.py").write_text(text, encoding="utf-8")
    identity = ("-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"], ["tag", "v0.1.0"]):
        subprocess.run(["git", *identity, "-C", str(tmp_path), *words], check=True)
    return tmp_path


def test_what_breaks_a_program_is_found_and_what_does_not_is_not(released):
    package = released / "src" / "bessemer"
    assert api_changes.last_tag(released) == "v0.1.0" and api_changes.breaking(released, "v0.1.0") == []
    # a name that is loaded from elsewhere, a new parameter with a default, and what is private, break nothing
    (package / "__init__.py").write_text(INIT.replace('"moved": ("bessemer.one"', '"moved": ("bessemer.two"'), encoding="utf-8")
    (package / "two.py").write_text("def moved(text, limit=None): ...\n", encoding="utf-8")
    (package / "one.py").write_text(
        ONE.replace("def moved(text): ...\n", "").replace("_inner(self)", "_other(self)"), encoding="utf-8"
    )
    assert api_changes.breaking(released, "v0.1.0") == []
    (package / "base.py").write_text("class Base:\n    def close(self, wait): ...\n", encoding="utf-8")
    (package / "one.py").write_text(
        ONE.replace("steps=1, *, seed=2", "*, seed=3").replace("n=1", "more, n=1"), encoding="utf-8"
    )
    found = "\n".join(api_changes.breaking(released, "v0.1.0"))
    for change in (
        "Base.close(wait)",
        "run(steps): Parameter was removed",
        "run(seed): Parameter default",
        "Engine.generate(more)",
    ):
        assert change in found
    assert "\x1b" not in found and str(released) not in found
    (package / "__init__.py").write_text(INIT.replace('"run": ("bessemer.one", "x"), ', ""), encoding="utf-8")
    assert any(line.endswith("Public object was removed") for line in api_changes.breaking(released, "v0.1.0"))


def test_the_stable_names_are_those_of_the_package_and_of_the_page():
    names = api_changes.stable_names(ROOT)
    assert set(names) == (set(bessemer.__all__) - {"__version__"}) | set(api_changes.PLUGIN_NAMES)
    page = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(?:bessemer\.)?(?:core\.\w+\.)?(\w+)` \|", page, re.MULTILINE)
    assert set(listed) == set(names) | {"__version__"}
    assert f"`{bessemer.__name__}.{next(iter(names))}`" in page


@pytest.mark.slow
def test_nothing_stable_broke_since_the_last_release_unless_the_changelog_says_so():
    tag = api_changes.last_tag()
    if tag is None:
        pytest.skip("no tag to compare with")
    said = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("## Unreleased")[2].partition("\n## ")[0]
    broken = [line for line in api_changes.breaking(ROOT, tag) if "### Breaking" not in said]
    assert broken == []
