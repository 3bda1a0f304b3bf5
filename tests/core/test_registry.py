import sys

import pytest

from bessemer.core.config import Config, setting
from bessemer.core.errors import ConfigError
from bessemer.core.registry import Plugin, Registry, plugin_versions
from tests.plugin_package import install

GROUP = "bessemer.test_greetings"

CODE = """
from bessemer.core.registry import Plugin

PLUGIN = Plugin("wave", "Waves", lambda name: f"({name})")
MISNAMED = Plugin("another", "Has another name than its entry point", str)
OBJECT = 3
"""


@pytest.fixture
def greetings():
    return Registry(
        "greeting",
        GROUP,
        [Plugin("hello", "Says hello", lambda name: f"hello {name}"), Plugin("shout", "Shouts", "builtins:ascii")],
    )


@pytest.fixture
def package(tmp_path, monkeypatch):
    def package(**objects):
        named = {name: f"greeting_plugin:{place}" for name, place in objects.items()}
        install(tmp_path, monkeypatch, "greeting_plugin", CODE, {GROUP: named})

    yield package
    sys.modules.pop("greeting_plugin", None)


def test_an_own_plugin_is_found_by_its_name(greetings):
    assert greetings.find("hello").load()("you") == "hello you"
    assert greetings["hello"].description == "Says hello" and list(greetings) == ["hello", "shout"] and len(greetings) == 2


def test_an_implementation_named_by_module_and_attribute_is_imported_when_it_is_loaded(greetings):
    assert greetings["shout"].implementation == "builtins:ascii" and greetings["shout"].load() is ascii


def test_an_unknown_name_is_refused_with_the_nearest_one(greetings):
    with pytest.raises(ConfigError, match=r"there is no greeting 'helo'; did you mean 'hello'\?"):
        greetings.find("helo")
    with pytest.raises(ConfigError, match="there is no greeting 'xyz'; known: hello, shout"):
        greetings.find("xyz")


def test_an_entry_point_of_another_package_is_found(greetings, package):
    package(wave="PLUGIN")
    assert greetings.find("wave").load()("you") == "(you)"
    assert list(greetings) == ["hello", "shout", "wave"] and len(greetings) == 3


def test_listing_names_imports_no_other_package(greetings, package):
    package(wave="PLUGIN")
    assert "wave" in greetings and "greeting_plugin" not in sys.modules


def test_an_own_plugin_cannot_be_replaced_by_another_package(greetings, package):
    package(hello="PLUGIN")
    assert greetings["hello"].description == "Says hello" and len(greetings) == 2


@pytest.mark.parametrize("place", ["MISNAMED", "OBJECT"])
def test_an_entry_point_that_is_no_plugin_of_its_name_is_refused(greetings, package, place):
    package(wave=place)
    with pytest.raises(ConfigError, match=f"the entry point 'wave' of {GROUP} is not a Plugin of that name"):
        greetings.find("wave")


class Settings(Config):
    greeting: str = setting("hello", "a greeting", plugins=GROUP)
    farewells: list[str] = setting(description="farewells", default_factory=list, plugins="bessemer.test_farewells")


def test_the_versions_of_the_packages_that_settings_name_are_told(package):
    package(wave="PLUGIN")
    named = Settings(greeting="wave", farewells=["bye", "wave"]).plugins()
    assert named == [("bessemer.test_farewells", "bye"), ("bessemer.test_farewells", "wave"), (GROUP, "wave")]
    assert plugin_versions(named) == {f"{GROUP}:wave": "greeting_plugin 1.2"}
    assert plugin_versions(Settings().plugins()) == {}
