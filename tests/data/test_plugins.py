"""A source, a filter, an edit and a deduplication method of another package, which an entry point names."""

from __future__ import annotations

import sys

import pytest

from bessemer.core.errors import ConfigError
from bessemer.core.registry import plugin_versions
from bessemer.data.config import CleanConfig
from bessemer.data.corpus.reader import iterate_documents
from bessemer.data.filters.registry import column_description
from bessemer.data.sources.registry import source_fingerprint
from bessemer.data.stages.clean import clean, scorers
from bessemer.data.stages.collect import collect
from bessemer.data.stages.deduplicate import deduplicate
from bessemer.data.stages.select import select
from bessemer.pipeline.recipe import load_recipe

ENTRY_POINTS = """
[bessemer.sources]
shouts = shouting.declarations:SOURCE

[bessemer.filters]
shouting = shouting.declarations:FILTER
broken = shouting.declarations:SOURCE
shouts = shouting.declarations:SOURCE

[bessemer.edits]
quieten = shouting.declarations:EDIT

[bessemer.deduplication]
opening = shouting.declarations:METHOD
"""

DECLARATIONS = '''
from typing import Literal

from bessemer.core.config import Config, setting
from bessemer.data.plugins import Column, EditPlugin, FilterPlugin, MethodPlugin, SourcePlugin
from bessemer.data.sources.registry import SourceSettings


class Shouts(SourceSettings):
    """Shouts, each a document."""

    source: Literal["shouts"] = setting("shouts", "kind of source")
    count: int = setting(3, "how many", ge=1)


class Opening(Config):
    """How much of a text counts."""

    characters: int = setting(4, "characters from the beginning", ge=1)


SOURCE = SourcePlugin("shouts", "shouts", "shouting.code:open_shouts", Shouts)
FILTER = FilterPlugin(
    "shouting",
    "share of capitals",
    "shouting.code:shouting",
    columns={"shouting": Column("share of the letters that are capitals", limit=(None, 0.5))},
)
EDIT = EditPlugin(
    "quieten", "no exclamation", "shouting.code:quieten", columns={"quieten_marks": Column("marks removed", "int64")}
)
METHOD = MethodPlugin("opening", "texts that begin alike", "shouting.code:opening", Opening)
'''

CODE = """
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bessemer.data.deduplication.removals import DuplicateRemovals
from bessemer.data.sources.source import Document
from bessemer.data.sources.source import Unit, counted


@dataclass(frozen=True)
class Shouting:
    count: int

    def units(self, progress=None):
        return [Unit("shouts", 0)]

    def read(self, unit, start, tally):
        yield from counted(lambda _: (Document(f"{n}", text(n)) for n in range(self.count)), start, tally)

    def fingerprint(self):
        return ["shouts", self.count]


def text(number):
    return f"FIRE {number}!" if number % 2 else f"no fire {number}"


def open_shouts(settings, folder, cache):
    return Shouting(settings.count)


def shouting(texts):
    shares = [sum(map(str.isupper, text)) / max(sum(map(str.isalpha, text)), 1) for text in texts.array.to_pylist()]
    return {"shouting": pa.array(shares, pa.float64())}


def quieten(texts):
    marks = pc.cast(pc.count_substring(texts.array, "!"), pa.int64())
    return pc.replace_substring(texts.array, "!", ""), {"quieten_marks": marks}


def opening(corpus, scratch, settings, folder):
    first, dropped, survivors = {}, [], []
    for numbers, texts in corpus.texts():
        for number, text in zip(numbers.tolist(), texts.array.to_pylist()):
            if first.setdefault(text[: settings.characters], number) != number:
                dropped.append(number)
                survivors.append(first[text[: settings.characters]])
    removals = DuplicateRemovals.of("opens", corpus, np.array(dropped, np.int64), np.array(survivors, np.int64))
    return removals, {"openings": len(first)}
"""

RECIPE = """\
format: 1
name: shouts
collect:
  - {source: shouts, count: 6}
clean: {edit: [quieten], score: [shouting]}
deduplicate: [opening]
select: {keep: shouting, languages: []}
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    place = tmp_path / "site"
    (place / "shouting").mkdir(parents=True)
    (place / "shouting" / "__init__.py").touch()
    (place / "shouting" / "declarations.py").write_text(DECLARATIONS, encoding="utf-8")
    (place / "shouting" / "code.py").write_text(CODE, encoding="utf-8")
    (place / "shouting-1.5.dist-info").mkdir()
    (place / "shouting-1.5.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: shouting\nVersion: 1.5\n", encoding="utf-8"
    )
    (place / "shouting-1.5.dist-info" / "entry_points.txt").write_text(ENTRY_POINTS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(place))
    yield place
    for name in [name for name in sys.modules if name.partition(".")[0] == "shouting"]:
        del sys.modules[name]


def recipe(tmp_path, text=RECIPE):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(str(path))


def made(tmp_path, name):
    (tmp_path / name).mkdir()
    return tmp_path / name


def texts_of(folder):
    return sorted(text for batch in iterate_documents(folder) for text in batch.column("text").to_pylist())


def test_a_recipe_collects_cleans_deduplicates_and_selects_with_another_packages_plugins(tmp_path, package):
    stages = {stage.name: stage.config for stage in recipe(tmp_path).stages}
    collected, cleaned, unique, selected = (made(tmp_path, name) for name in ("a", "b", "c", "d"))
    collect(stages["collect"], collected, cache=tmp_path)
    assert texts_of(collected / "documents") == ["FIRE 1!", "FIRE 3!", "FIRE 5!", "no fire 0", "no fire 2", "no fire 4"]
    clean(stages["clean"], collected / "documents", cleaned)
    rows = [row for batch in iterate_documents(cleaned / "documents") for row in batch.to_pylist()]
    assert {(row["text"], row["shouting"], row["quieten_marks"]) for row in rows} >= {("FIRE 1", 1.0, 1), ("no fire 0", 0.0, 0)}
    metrics = deduplicate(stages["deduplicate"], cleaned / "documents", unique)
    assert metrics["duplicates"] == {"opening": {"openings": 2}}
    assert metrics["by_reason"]["opens"]["documents"] == 4
    metrics = select(stages["select"], unique / "documents", selected)
    assert metrics["documents_out"] == 1
    assert list(metrics["by_reason"]) == ["shouting"]
    assert "share of the letters that are capitals" in (selected / "README.md").read_text(encoding="utf-8")


def test_a_recipe_is_checked_without_the_plugins_code(tmp_path, package):
    recipe(tmp_path)
    assert "shouting.declarations" in sys.modules
    assert "shouting.code" not in sys.modules


def test_the_packages_version_is_part_of_the_stages_key(tmp_path, package):
    stages = {stage.name: stage.config for stage in recipe(tmp_path).stages}
    assert plugin_versions(stages["collect"].plugins()) == {"bessemer.sources:shouts": "shouting 1.5"}
    assert plugin_versions(stages["clean"].plugins()) == {
        "bessemer.edits:quieten": "shouting 1.5",
        "bessemer.filters:shouting": "shouting 1.5",
    }
    assert plugin_versions(stages["deduplicate"].plugins()) == {"bessemer.deduplication:opening": "shouting 1.5"}
    assert plugin_versions(stages["select"].plugins()) == {"bessemer.filters:shouting": "shouting 1.5"}
    assert source_fingerprint(stages["collect"].sources[0], cache=tmp_path) == ["shouts", 6]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (RECIPE.replace("count: 6", "cuont: 6"), r"recipe.yaml:4: .*unknown key 'cuont'; did you mean 'count'\?"),
        (RECIPE.replace("count: 6", "count: 0"), r"recipe.yaml:4: .*greater than or equal to 1, got 0"),
        (RECIPE.replace("shouts, ", "shout, "), r"recipe.yaml:\d+: .*unknown source 'shout'; did you mean 'shouts'\?"),
        (RECIPE.replace("[shouting]", "[shoutin]"), r"recipe.yaml:\d+: .*unknown score 'shoutin'; did you mean 'shouting'\?"),
        (RECIPE.replace("keep: shouting", "keep: shoutin"), r"recipe.yaml:\d+: .*unknown preset 'shoutin'; did you mean"),
    ],
)
def test_a_mistake_is_named_with_file_and_line(tmp_path, package, wrong, message):
    with pytest.raises(ConfigError, match=message):
        recipe(tmp_path, wrong)


def test_an_entry_point_that_names_something_else_is_refused(package):
    with pytest.raises(ConfigError, match=r"the entry point 'broken' of bessemer\.filters is not a Plugin"):
        scorers(CleanConfig.parse({"score": ["broken"]}))
    with pytest.raises(ConfigError, match=r"the entry point 'shouts' of bessemer\.filters is not a FilterPlugin"):
        scorers(CleanConfig.parse({"score": ["shouts"]}))


def test_a_plugin_that_is_not_installed_is_unknown(tmp_path):
    with pytest.raises(ConfigError, match="unknown source 'shouts'"):
        recipe(tmp_path)
    assert column_description("shouting") == ""
