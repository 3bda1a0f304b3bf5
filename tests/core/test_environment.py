import pytest

from bessemer.core import environment


@pytest.mark.parametrize(
    ("limit", "stat", "left"),
    [
        ("1000", "anon 300\nactive_file 100\ninactive_file 200\n", 700),
        ("1000", "anon 600\n", 400),
        ("500", "anon 600\n", 0),
        ("max", "anon 600\n", None),
    ],
)
def test_a_containers_limit_leaves_what_is_neither_used_nor_cached(limit, stat, left, tmp_path):
    for name, text in (("max", limit), ("current", "600\n"), ("stat", stat)):
        (tmp_path / f"memory.{name}").write_text(text)
    assert environment._left_in_group(tmp_path) == left


def test_without_a_group_there_is_no_limit(tmp_path):
    assert environment._left_in_group(tmp_path) is None
