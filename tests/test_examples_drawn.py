"""Hypothesis draws the same examples every time, whatever ran before in the same process."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st


def drawn() -> list[tuple[int, str]]:
    """The examples of one property, in order."""
    examples = []

    @settings(max_examples=300, derandomize=True, database=None)
    @given(st.integers(), st.text(max_size=12))
    def note(number, text):
        examples.append((number, text))

    note()
    return examples


def test_examples_do_not_depend_on_the_modules_that_are_loaded(tmp_path, monkeypatch):
    before = drawn()
    monkeypatch.syspath_prepend(str(tmp_path))
    constants = "\n".join(f"NUMBER_{n} = {n * 7919 + 123456}\nTEXT_{n} = 'wootz{n}'" for n in range(500))
    (tmp_path / "many_constants.py").write_text(constants, encoding="utf-8")
    __import__("many_constants")
    assert drawn() == before
