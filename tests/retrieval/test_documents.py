"""Documentation of compiled modules, under the names that people call them by."""

from __future__ import annotations

from bessemer.retrieval.documents import builtin_documents


def test_compiled_functions_and_methods_have_their_public_names_and_words():
    documents = {document.place.removeprefix("python:"): document for document in builtin_documents()}
    for name in ("math.gcd", "itertools.chain", "str.partition", "struct.unpack", "os.urandom", "sorted", "collections.deque"):
        assert documents[name].text.strip(), name
    assert documents["math.gcd"].title == "math.gcd(*integers)"
    assert "greatest common divisor" in documents["math.gcd"].text.lower()
    assert not [name for name in documents if name.startswith("_") or "._" in name]
