from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import Field

from bessemer.core.config import ChosenSettings, Config, setting
from bessemer.core.errors import ConfigError


class Wheels(Config):
    source: Literal["wheels"] = "wheels"
    lock: str = setting("quickstart", "A lock.")


class Files(Config):
    source: Literal["files"] = "files"
    path: str = setting(description="A path.")


class Optimizer(Config):
    learning_rate: float = setting(3e-3, "Step size.", gt=0)


class Example(Config):
    shorthand = "sources"
    steps: int = setting(10, "Steps.", unit="steps", ge=1)
    workers: int = setting(1, "Workers.", affects_output=False)
    optimizer: Optimizer = setting(description="Optimizer.", default_factory=Optimizer)
    sources: list[Annotated[Wheels | Files, Field(discriminator="source")]] = setting(
        description="Sources.", default_factory=list
    )


def message(values) -> str:
    with pytest.raises(ConfigError) as caught:
        Example.parse(values, "example")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_key_names_the_nearest_valid_one():
    assert message({"step": 3}) == "example.step: unknown key 'step'; did you mean 'steps'?"


def test_unknown_nested_key_names_the_nearest_of_its_own_section():
    assert "did you mean 'learning_rate'" in message({"optimizer": {"learning_rat": 1}})


def test_unknown_key_in_a_tagged_list_is_compared_with_that_members_keys():
    assert "did you mean 'path'" in message({"sources": [{"source": "files", "pth": "x"}]})


def test_wrong_type_says_what_was_given():
    assert message({"steps": "many"}) == (
        "example.steps: input should be a valid integer, unable to parse string as an integer, got 'many'"
    )


def test_out_of_range_names_the_key_and_the_limit():
    text = message({"steps": 0})
    assert text.startswith("example.steps:")
    assert "greater than or equal to 1" in text


def test_missing_field_is_named():
    assert "'path' must be given" in message({"sources": [{"source": "files"}]})


def test_bare_list_stands_for_the_shorthand_field():
    assert Example.parse([{"source": "wheels"}]).sources[0].lock == "quickstart"


def test_fields_that_cannot_change_the_output_stay_out_of_the_key():
    settings = Example.parse({"workers": 8}).output_settings()
    assert "workers" not in settings
    assert settings == Example.parse({"workers": 2}).output_settings()
    assert settings != Example.parse({"steps": 11}).output_settings()


def test_nested_settings_enter_the_key():
    assert Example.parse({"optimizer": {"learning_rate": 1e-2}}).output_settings()["optimizer"] == {"learning_rate": 1e-2}


def test_a_setting_of_an_earlier_version_is_refused_with_its_new_name():
    class Inner(Config):
        retired: ClassVar = {"max_running": "max_num_seqs"}
        max_num_seqs: int = setting(8, "Sequences.")

    class Outer(Config):
        inner: list[Inner] = setting(default_factory=list, description="Several.")

    with pytest.raises(ConfigError, match="'max_running' is now 'max_num_seqs'"):
        Inner.parse({"max_running": 3}, "engine")
    with pytest.raises(ConfigError, match="'max_running' is now 'max_num_seqs'"):
        Outer.parse({"inner": [{"max_running": 3}]}, "engine")
    with pytest.raises(ConfigError, match="unknown key 'max_runing'"):
        Inner.parse({"max_runing": 3}, "engine")


def test_settings_know_the_plugins_that_they_name():
    class Inner(Config):
        optimizer: str = setting("adamw", "Optimizer.", plugins="bessemer.optimizers")

    class Outer(Config):
        score: list[str] = setting(default_factory=list, description="Filters.", plugins="bessemer.filters")
        inner: Inner = setting(default_factory=Inner, description="One.")
        name: str = setting("c4", "No plugin.")

    named = Outer.parse({"score": ["c4", "gopher"]}).plugins()
    assert named == [("bessemer.filters", "c4"), ("bessemer.filters", "gopher"), ("bessemer.optimizers", "adamw")]


def test_settings_that_a_key_chooses_are_hinted_at_on_a_field_and_in_a_list():
    class Shout(Config):
        source: str = setting("shout", "Kind.")
        count: int = setting(1, "Times.")

    class Holder(Config):
        one: Annotated[Config, ChosenSettings("source", lambda name: (name, Shout))] = setting(..., "One.")
        some: list[Annotated[Config, ChosenSettings("source", lambda name: (name, Shout))]] = setting(..., "Some.")

    right = {"source": "shout", "count": 2}
    for values in ({"one": right | {"cuont": 1}, "some": []}, {"one": right, "some": [right | {"cuont": 1}]}):
        with pytest.raises(ConfigError, match="unknown key 'cuont'; did you mean 'count'"):
            Holder.parse(values, "holder")
