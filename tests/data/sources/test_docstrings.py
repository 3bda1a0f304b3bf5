from __future__ import annotations

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bessemer.data.sources.python_docs import dedent, docstrings, is_documentation_code, module_name
from tests.data.conftest import MODULE


def found_in(source, path="ingot/files.py"):
    return list(docstrings(source.encode(), path))


def test_each_docstring_has_its_kind_name_and_signature():
    assert [(found.kind, found.qualname, found.signature) for found in found_in(MODULE)] == [
        ("module", "", None),
        ("class", "Ingot", 'Ingot(mass, *, alloy="steel")'),
        ("method", "Ingot.__init__", '__init__(self, mass, *, alloy="steel")'),
        ("method", "Ingot.price", None),
        ("method", "Ingot.melt", "melt(self, temperature=1538.0, /, *others, **options)"),
        ("function", "cast", 'cast(path, *, mould=("a", "b"), log=None)'),
        ("function", "cast", "cast(path)"),
    ]


def test_a_heading_links_the_name_with_its_parameters():
    headings = [found.heading for found in found_in(MODULE)]
    assert headings[0] == "module ingot.files"
    assert headings[1] == 'class ingot.files.Ingot(mass, *, alloy="steel")'
    assert headings[3] == "ingot.files.Ingot.price"
    assert headings[5] == 'ingot.files.cast(path, *, mould=("a", "b"), log=None)'


def test_definitions_that_share_a_name_get_different_locators():
    locators = [found.document("f.py", {}).locator for found in found_in(MODULE)]
    assert locators[-2:] == ["f.py#cast", "f.py#cast@2"]
    assert len(set(locators)) == len(locators)


def test_a_long_default_is_left_out():
    (found,) = found_in(f'def f(x={"1 + " * 30}1, y=2):\n    """Doc."""\n')
    assert found.signature == "f(x=..., y=2)"


def test_defaults_are_cut_by_bytes_not_by_characters():
    (found,) = found_in('def f(é="ü", ß="x"): """Doc."""\n')
    assert found.signature == 'f(é="ü", ß="x")'


def test_a_form_feed_does_not_shift_the_lines():
    (found,) = found_in('x = """\n"""\n\x0c\ndef f(a=1):\n    """Doc."""\n')
    assert found.signature == "f(a=1)"


def test_carriage_returns_end_lines_too():
    (found,) = found_in('x = 1\r\n\r\ndef f(a=(1,\r\n 2)):\r\n    """Doc."""\r\n')
    assert found.signature == "f(a=(1, 2))"


def test_what_is_defined_inside_a_function_is_left_out():
    assert [found.qualname for found in found_in('def f():\n    """Outer."""\n    def g():\n        """Inner."""\n')] == ["f"]


def test_a_file_that_is_not_python_raises_an_error_that_callers_count():
    with pytest.raises((SyntaxError, ValueError)):
        found_in('"""Doc."""\ndef (:\n')
    with pytest.raises((SyntaxError, ValueError)):
        found_in('"""Doc."""\n\x00\n')


def test_parsing_leaves_the_garbage_collector_on():
    import gc

    found_in('"""Doc."""\n')
    assert gc.isenabled()


@given(st.lists(st.text(alphabet=" \tab", max_size=12), max_size=6))
def test_dedent_agrees_with_inspect(lines):
    docstring = "\n".join(lines)
    expected = "\n".join(line.rstrip() for line in inspect.cleandoc(docstring).split("\n")).strip("\n")
    assert dedent(docstring) == expected


@given(st.text())
def test_dedent_takes_any_string(text):
    dedent(text).encode("utf-8")


@given(st.text(max_size=60).filter(lambda text: not any("\ud800" <= letter <= "\udfff" for letter in text)))
def test_a_default_is_kept_as_written_or_left_out_when_long(text):
    written = repr(text)
    (found,) = found_in(f"def f(a={written}, b=1):\n    '''Doc.'''\n")
    shown = " ".join(written.split())
    assert found.signature == f"f(a={shown if len(shown) <= 40 else '...'}, b=1)"


@pytest.mark.parametrize(
    ("path", "is_read"),
    [
        ("sympy/core/add.py", True),
        ("numpy/testing/utils.py", True),
        ("sympy/core/tests/test_add.py", False),
        ("jax/_src/test_util_test.py", False),
        ("pip/_vendor/six.py", False),
        ("a/schema_pb2.py", False),
        ("a/conftest.py", False),
        ("a/data.txt", False),
    ],
)
def test_tests_vendored_and_generated_code_is_not_documentation(path, is_read):
    assert is_documentation_code(path) is is_read


def test_a_package_is_named_by_its_folder():
    assert module_name("json/__init__.py") == "json"
    assert module_name("json/decoder.py") == "json.decoder"
