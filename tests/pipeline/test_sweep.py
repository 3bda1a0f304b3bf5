import csv
from pathlib import Path

import pytest

from bessemer.core.errors import ConfigError
from bessemer.pipeline.run_folder import RunFolder
from bessemer.pipeline.sweep import members, split_values, sweep, sweep_rows, write_sweep


def names(*arguments, **options):
    return [member.name for member in members(*arguments, **options)]


def test_members_are_every_combination_and_are_named_by_what_varies(recipe):
    found = members(recipe(), ["count.times=1,2", "train.steps=3", "train.minutes=null", "train.rows=4,5"])
    assert [member.name for member in found] == [
        "small-times-1-rows-4",
        "small-times-1-rows-5",
        "small-times-2-rows-4",
        "small-times-2-rows-5",
    ]
    assert found[0].overrides == ("count.times=1", "train.steps=3", "train.minutes=null", "train.rows=4")


def test_a_ladder_s_settings_go_together(recipe):
    found = members(recipe(), ["count.times=1,2,2", "train.rows=4,5,6"], zipped=[["count.times", "train.rows"]])
    assert [dict(member.varied) for member in found] == [
        {"count.times": "1", "train.rows": "4"},
        {"count.times": "2", "train.rows": "5"},
        {"count.times": "2", "train.rows": "6"},
    ]


def test_seeds_go_on_from_the_recipe_s(recipe):
    name = recipe(head="format: 1\nname: small\nseed: 7\n")
    assert names(name, ["count.times=1"], seeds=3) == ["small-seed-7", "small-seed-8", "small-seed-9"]


def test_values_that_read_alike_in_a_name_have_names_of_their_own(recipe):
    found = names(recipe(), ["words=[a, b],[a; b]"])
    assert len(set(found)) == 2 and all(name.startswith("small-words-_a_b_-") for name in found)


def test_commas_in_brackets_and_quotes_do_not_part_values():
    assert split_values("[a, b],{c: [1, 2], d: 3},'e,f',4") == ["[a, b]", "{c: [1, 2], d: 3}", "'e,f'", "4"]


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        (["count.times"], {}, "a setting to sweep is KEY=A,B,C"),
        (["count.times=1,,2"], {}, "a value of the list is empty"),
        (["count.times=1,1"], {}, "count.times=1: is given twice"),
        (["count.times=1,1", "train.rows=4,4"], {"zipped": [["count.times", "train.rows"]]}, "train.rows=4: is given twice"),
        (["count.time=1,2"], {}, "did you mean 'times'?"),
        (["count.times=1,2", "train.rows=1,2,3"], {"zipped": [["count.times", "train.rows"]]}, "different lengths"),
        (["count.times=1,2"], {"zipped": [["train.rows"]]}, "train.rows has no values here"),
        (["seed=1,2"], {"seeds": 2}, "leave out --seeds"),
    ],
)
def test_a_mistake_is_named_before_anything_runs(recipe, calls, settings, options, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        sweep("recipe.yaml", members(recipe(), settings, **options))
    assert calls == []


def test_a_value_that_one_member_cannot_have_is_named_before_any_runs(recipe, calls):
    with pytest.raises(ConfigError, match="small-times-0: "):
        sweep("recipe.yaml", members(recipe(), ["count.times=1,0"]))
    assert calls == []


def test_members_share_what_the_settings_do_not_touch(recipe, calls):
    outcomes = sweep("recipe.yaml", members(recipe(), ["count.times=2,3"]))
    assert [one.status for one in outcomes] == ["done", "done"]
    assert calls.count("words") == 1 and calls.count("count") == 2
    assert RunFolder(Path("runs"), "small-times-3").metrics()["count"] == {"count": 9}


def test_a_member_that_fails_stops_no_other_and_is_tried_again(recipe, calls):
    chosen = members(recipe(), ["words=[bad],[a]"])
    seen = []
    outcomes = sweep("recipe.yaml", chosen, on_outcome=lambda so_far: seen.append(len(so_far)))
    assert [one.status for one in outcomes] == ["failed", "done"] and seen == [1, 2]
    assert outcomes[0].problem == "words: 'bad' is not usable"
    calls.clear()
    sweep("recipe.yaml", chosen)
    # the good one's stages are all there
    assert calls == ["words"]


def test_an_interrupted_sweep_goes_on_where_it_stopped(recipe, calls):
    chosen = members(recipe(), ["count.times=2,3"])
    calls.stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        sweep("recipe.yaml", chosen)
    calls.clear()
    assert [one.status for one in sweep("recipe.yaml", chosen)] == ["done", "done"]
    assert "from 3" in calls and calls.count("words") == 0


def test_the_table_has_a_line_for_every_member(recipe, tmp_path):
    outcomes = sweep("recipe.yaml", members(recipe(), ["words=[bad],[a]"]))
    write_sweep(tmp_path / "sweeps" / "small.csv", outcomes)
    with (tmp_path / "sweeps" / "small.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["words"], row["status"], row["loss"]) for row in rows] == [("[bad]", "failed", ""), ("[a]", "done", "")]
    assert sweep_rows(outcomes)[0]["problem"] == "words: 'bad' is not usable"
