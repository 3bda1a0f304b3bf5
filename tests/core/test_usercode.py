import pytest

from bessemer.core.errors import ConfigError
from bessemer.core.usercode import is_user_function, load_user_function, user_function_hash


def test_a_name_with_a_file_is_a_user_function():
    assert is_user_function("my_rewards.py:brief")
    assert not is_user_function("gopher_quality")
    assert not is_user_function("notes.py")


def test_the_function_is_found_beside_the_recipe(tmp_path):
    (tmp_path / "mine.py").write_text("def double(x):\n    return 2 * x\n")
    assert load_user_function("mine.py:double", tmp_path)(21) == 42


def test_an_edit_changes_the_hash(tmp_path):
    (tmp_path / "mine.py").write_text("def f(): return 1\n")
    before = user_function_hash("mine.py:f", tmp_path)
    (tmp_path / "mine.py").write_text("def f(): return 2\n")
    assert user_function_hash("mine.py:f", tmp_path) != before


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
        (tmp_path / "mine.py").write_text(source)
    with pytest.raises(ConfigError, match=expected):
        load_user_function(name, tmp_path)
