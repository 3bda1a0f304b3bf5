import lzma

import pytest

from bessemer.evaluation.baselines import xz_bits_per_byte


def test_bits_are_those_of_the_xz_file_and_bytes_those_of_the_documents():
    documents = [b"one document", b"another document"]
    size = len(lzma.compress(b"one document\nanother document", preset=9))
    assert xz_bits_per_byte(documents) == pytest.approx(8 * size / 28)
