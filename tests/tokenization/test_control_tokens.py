"""What a string may hold of a control token, wherever the token is cut, is escaped and comes back."""

import unicodedata
from itertools import combinations, pairwise

import pytest

from bessemer.tokenization.control_tokens import ControlTokens, StandIns, _candidates, control_tokens

#: Of different lengths: the longest decides how far a string is searched.
TOKENS = ("<s>", "<|im_end|>", "[INST]", "<|start_header_id|>")


@pytest.fixture
def control():
    return ControlTokens(TOKENS)


def cuts(token: str):
    """The token in two, three and four parts, none empty."""
    for count in (1, 2, 3):
        for places in combinations(range(1, len(token)), count):
            ends = (0, *places, len(token))
            yield [token[start:end] for start, end in pairwise(ends)]


@pytest.mark.parametrize("token", TOKENS)
def test_a_template_that_joins_strings_makes_no_token_of_their_parts(token, control):
    for parts in cuts(token):
        stand_ins = StandIns("".join(parts))
        escaped = [control.escaped(part, stand_ins) for part in parts]
        # whichever of the parts are the template's own, one that somebody typed is enough to break the token
        for place, part in enumerate(escaped):
            joined = "".join((*parts[:place], part, *parts[place + 1 :]))
            assert not control.pattern.search(joined), parts
            assert not control.pattern.search("".join((*parts[:place], part.upper(), *parts[place + 1 :])).lower()), parts
        assert [stand_ins.put_back(part) for part in escaped] == parts


@pytest.mark.parametrize("token", TOKENS)
def test_a_token_in_a_text_and_one_at_either_end_are_escaped_in_any_case(token, control):
    for text in (token, f"a {token} b", f" {token[:-1]} ", f"a{token[:1]}", f"{token[-1:]}b", token.upper(), token * 2):
        stand_ins = StandIns(text)
        escaped = control.escaped(text, stand_ins)
        assert escaped != text and len(escaped) == len(text)
        assert not control.pattern.search(f"{token[:-1]}{escaped}{token[1:]}")
        assert stand_ins.put_back(escaped) == text


def test_of_tokens_that_overlap_in_a_text_each_is_escaped():
    control, stand_ins = ControlTokens(["<<a", "<a>", "aaa"]), StandIns("")
    for text in ("x<<a>x", "xaaaaax"):
        assert not control.pattern.search(control.escaped(text, stand_ins))


def test_what_can_be_no_part_of_a_token_stays(control):
    stand_ins = StandIns("")
    for text in ("", "a < b", "x|y", "user", "The header's name is long."):
        assert control.escaped(text, stand_ins) == text


def test_fully_escaped_text_has_no_character_that_begins_or_ends_a_token(control):
    stand_ins = StandIns("")
    assert not {"<", ">", "[", "]"} & set(control.fully_escaped("a < b > c [d] e", stand_ins))
    assert control.fully_escaped("user", stand_ins) == "user"


def test_stand_ins_are_characters_of_no_text():
    found = list(_candidates())
    assert len(found) == len(set(found)) == 32 + 32 + 1024
    assert {unicodedata.category(char) for char in found} == {"Cn", "Co"}
    # as it is, and as JSON writes it
    assert StandIns("\ufdd0 \\ufdd1").free() == "\ufdd2"


def test_the_tokens_of_a_new_tokenizer_are_those_of_the_template_of_the_middle_and_reserved_ones():
    middle = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    assert control_tokens("plain", 2, True) == ("<|endoftext|>", *middle, "<|reserved_0|>", "<|reserved_1|>")
