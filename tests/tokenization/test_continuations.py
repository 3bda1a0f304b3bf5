"""Prefix and continuations in tokens: worked cases with a tokenizer of bytes, `th`, `the`, ` a` and `in`."""

from __future__ import annotations

import pytest

from bessemer.tokenization.prompts import encode_continuations
from bessemer.tokenization.tokenizer import load_tokenizer
from tests.model.tokenizers import write_small_tokenizer

TH, THE, A, IN = 256, 257, 258, 259


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_small_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize(
    ("prefix", "continuation", "prefix_ids", "continuation_ids"),
    [
        ("x", " a", [ord("x")], [A]),
        ("x ", "a", [ord("x")], [A]),
        ("x", "a", [ord("x")], [ord("a")]),
        ("x \n", "a", [ord("x")], [ord(" "), ord("\n"), ord("a")]),
        ("in", "in", [IN], [IN]),
        # encoded whole, `the` is one token where `th` is one by itself: nothing is left
        ("th", "e", [TH], []),
        ("", "the", [], [THE]),
        (" ", "a", [], [A]),
    ],
)
def test_a_continuation_is_what_follows_as_many_tokens_as_the_prefix_has(
    prefix, continuation, prefix_ids, continuation_ids, tokenizer
):
    begin = [tokenizer.bos_id]
    assert encode_continuations(tokenizer, prefix, [continuation]) == ([*begin, *prefix_ids], [continuation_ids])


def test_an_empty_prefix_is_the_begin_token_where_the_file_puts_none_before_a_text(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "_before", [])
    assert encode_continuations(tokenizer, "", ["in"]) == ([tokenizer.bos_id], [[IN]])
    assert encode_continuations(tokenizer, "x", ["in"]) == ([ord("x")], [[IN]])
