import sys

import pytest

from bessemer.core.errors import ConfigError
from bessemer.core.usercode import is_user_function, load_user_function, user_function_hash


def test_a_name_with_a_file_is_a_user_function():
    assert is_user_function("my_rewards.py:brief")
    assert not is_user_function("gopher_quality")
    assert not is_user_function("notes.py")


def test_the_function_is_found_beside_the_recipe(tmp_path):
    (tmp_path / "mine.py").write_text("def double(x):\n    return 2 * x\n", encoding="utf-8")
    assert load_user_function("mine.py:double", tmp_path)(21) == 42


def test_an_edit_changes_the_hash(tmp_path):
    (tmp_path / "mine.py").write_text("def f(): return 1\n", encoding="utf-8")
    before = user_function_hash("mine.py:f", tmp_path)
    (tmp_path / "mine.py").write_text("def f(): return 2\n", encoding="utf-8")
    assert user_function_hash("mine.py:f", tmp_path) != before


DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Limit:
    most: int = 3

def most():
    return Limit().most
"""


def test_a_dataclass_with_postponed_annotations_is_imported(tmp_path):
    (tmp_path / "mine.py").write_text(DATACLASS, encoding="utf-8")
    assert load_user_function("mine.py:most", tmp_path)() == 3


def test_a_file_that_fails_to_import_is_not_left_among_the_modules(tmp_path):
    (tmp_path / "mine.py").write_text("1/0\n", encoding="utf-8")
    before = set(sys.modules)
    with pytest.raises(ConfigError):
        load_user_function("mine.py:f", tmp_path)
    assert set(sys.modules) == before


IMPORTS = {
    "mine.py": "import ore_helper\n\ndef f():\n    from ore_package.deep import depth\n    return ore_helper.value + depth\n",
    "ore_helper.py": "from ore_constants import unit\nvalue = unit * 1\n",
    "ore_constants.py": "unit = 10\n",
    "ore_package/__init__.py": "",
    "ore_package/deep.py": "from .base import depth\n",
    "ore_package/base.py": "depth = 1\n",
    "json.py": "1/0\n",
    "unrelated.py": "1/0\n",
}


@pytest.mark.parametrize(
    ("edited", "old", "new", "changed", "gives"),
    [
        ("mine.py", "+ depth", "- depth", True, 9),
        ("ore_helper.py", "* 1", "* 2", True, 21),
        ("ore_constants.py", "10", "20", True, 21),
        ("ore_package/base.py", "1", "5", True, 15),
        ("unrelated.py", "1", "2", False, 11),
        ("json.py", "1", "2", False, 11),
    ],
)
def test_what_a_file_imports_from_beside_it_is_in_its_hash_and_imported_as_it_is_now(
    tmp_path, edited, old, new, changed, gives
):
    for name, text in IMPORTS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    before = user_function_hash("mine.py:f", tmp_path)
    assert load_user_function("mine.py:f", tmp_path)() == 11
    (tmp_path / edited).write_text(IMPORTS[edited].replace(old, new), encoding="utf-8")
    assert (user_function_hash("mine.py:f", tmp_path) != before) == changed
    assert load_user_function("mine.py:f", tmp_path)() == gives


def test_a_folder_without_init_is_imported_from_too(tmp_path):
    (tmp_path / "ore_parts").mkdir()
    (tmp_path / "ore_parts" / "size.py").write_text("size = 7\n", encoding="utf-8")
    (tmp_path / "mine.py").write_text("from ore_parts import size\ndef f(): return size.size\n", encoding="utf-8")
    assert load_user_function("mine.py:f", tmp_path)() == 7


@pytest.mark.parametrize(
    ("source", "name", "expected"),
    [
        (None, "mine.py:f", "there is no file"),
        ("def g(): ...\n", "mine.py:f", "has no function 'f'; it has: g"),
        ("1/0\n", "mine.py:f", "ZeroDivisionError"),
    ],
)
def test_what_is_wrong_with_a_users_file_is_said(tmp_path, source, name, expected):
    if source:
        (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    with pytest.raises(ConfigError, match=expected):
        load_user_function(name, tmp_path)
