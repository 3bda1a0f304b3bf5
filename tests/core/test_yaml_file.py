"""YAML files that cannot be read are said in one line, and empty ones have no keys."""

import pytest

from bessemer.core.errors import ConfigError
from bessemer.core.policy import read_policy
from bessemer.core.yaml_file import parse_value, parse_yaml, read_yaml


def said_of(code):
    """What this version of Python says of a character that there is not."""
    try:
        return chr(code)
    except (OverflowError, ValueError) as error:
        return str(error)


WRONG = {
    "name: 2020-13-45": "x:1: not valid YAML: '2020-13-45' cannot be read as timestamp",
    f"a: 1\nb: {'9' * 5000}": f"x:2: not valid YAML: '{'9' * 40}…' cannot be read as int",
    "a: !!int abc": "x:1: not valid YAML: 'abc' cannot be read as int",
    "a:\n  - 1\n  - !!float abc": "x:3: not valid YAML: 'abc' cannot be read as float",
    "a: {b: !!bool abc}": "x:1: not valid YAML: 'abc' cannot be read as bool",
    "\na: !!omap abc": "x:2: not valid YAML: 'abc' cannot be read as omap",
    "!!int [1]: 2": "x:1: not valid YAML: expected a scalar node, but found sequence",
    'a: "\\UFFFFFFFF"': f"x: not valid YAML: {said_of(0xFFFFFFFF)}",
    "a: " + "[" * 1000: "x: is nested too deeply",
    "a: " + "[" * 400 + "]" * 400: "x: is nested too deeply",
    "&a [*a]": "x: is nested too deeply",
    "- 1": "x: this must be a mapping of keys to values, it is a list",
    "5": "x: this must be a mapping of keys to values, it is a int",
}


@pytest.mark.parametrize(("text", "message"), WRONG.items(), ids=[text[:20] for text in WRONG])
def test_what_cannot_be_read_is_said_in_one_line(text, message):
    with pytest.raises(ConfigError) as error:
        parse_yaml(text, "x")
    assert str(error.value) == message


@pytest.mark.parametrize("text", ["!!int abc", "9" * 5000, "[" * 1000])
def test_an_override_that_cannot_be_read_is_said_too(text):
    with pytest.raises(ConfigError, match=r"^a=: ?|^a=:1: "):
        parse_value(text, "a=")


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "---\n", "null\n"])
def test_an_empty_file_has_no_keys_and_the_missing_one_is_named(tmp_path, text):
    path = tmp_path / "policy.yaml"
    path.write_text(text, encoding="utf-8")
    placed = read_yaml(path)
    assert placed.values == {} and str(placed.place(("format",))) == f"{path}:1"
    with pytest.raises(ConfigError, match=rf"^{path}:1: 'format' must be given$"):
        read_policy(path)


def test_a_line_break_in_a_key_stays_out_of_the_message(tmp_path):
    path = tmp_path / "policy.yaml"
    principle = "{critique: a, revision: b, comparison: c}"
    path.write_text(
        f'format: 1\nname: x\ncategories: {{"privacy\\n": {{meaning: x}}}}\nprinciples: {{privacy: {principle}}}\n',
        encoding="utf-8",
    )
    with pytest.raises(ConfigError) as error:
        read_policy(path)
    assert str(error.value).startswith(rf"{path}:3: categories.'privacy\n'.[key]: string should match pattern")
    assert "\n" not in str(error.value)


def test_keys_that_are_all_merged_from_elsewhere_and_items_of_another_tag_have_no_line():
    placed = parse_yaml("a:\n  <<: {b: 1}\nc: !!str [2]\n", "x")
    assert placed.values == {"a": {"b": 1}, "c": [2]}
    assert str(placed.place(("a", "b"))) == str(placed.place(("c", 0))) == "x"
    assert str(placed.place(("c",))) == "x:3"
