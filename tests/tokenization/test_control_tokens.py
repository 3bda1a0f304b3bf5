"""What a string may hold of a control token, wherever the token is cut, is escaped and comes back."""

import json
import re
import unicodedata
from itertools import combinations, pairwise

import pytest

from bessemer.tokenization.control_tokens import (
    ControlTokens,
    StandIns,
    _candidates,
    control_tokens,
    map_strings,
    split_at,
    strings_of,
)

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


def test_a_text_is_cut_at_control_tokens_and_at_marks_which_are_none():
    pieces = list(split_at("<s>a#b<s><s>", re.compile(re.escape("<s>")), ["#"]))
    assert pieces == [("<s>", True), ("a", False), ("#", False), ("b", False), ("<s>", True), ("<s>", True)]


def test_every_string_of_a_json_value_is_found_and_changed_and_nothing_else():
    value = {"a": ["b", 1, {"c": None}], "d": "e"}
    assert list(strings_of(value)) == ["a", "b", "c", "d", "e"]
    changed = map_strings(value, str.upper, lambda key: key + "!")
    assert changed == {"a!": ["B", 1, {"c!": None}], "d!": "E"}


def test_candidates_are_the_noncharacters_and_a_thousand_private_ones():
    codes = [ord(char) for char in _candidates()]
    assert codes == [
        code for code in range(0x110000) if 0xFDD0 <= code < 0xFDF0 or (code > 0xFFFF and code & 0xFFFE == 0xFFFE)
    ] + [*range(0xF0000, 0xF0400)]


def test_tokens_are_the_longest_first_and_parts_of_them_anywhere_a_template_could_join():
    control = ControlTokens(["<s>", "", "[INST]", "<s>"])
    assert control.tokens == ("[INST]", "<s>")
    places = {
        text: control._places(text) for text in ("x <", "> x", "x<s", "s>x", " ins ", "s", "nst", "xs", "user", "[inst", "")
    }
    assert places == {
        "x <": {2},
        "> x": {0},
        "x<s": {1},
        "s>x": {1},
        " ins ": {1},
        "s": {0},
        "nst": {0},
        "xs": set(),
        "user": set(),
        "[inst": {0},
        "": set(),
    }
    assert ControlTokens([])._places("<s>") == set()


def test_keys_that_are_names_stay_and_all_edges_go_where_nothing_is_known_of_the_template(control):
    stand_ins = StandIns("")
    assert control.escaped_key("s", stand_ins) == "s" != control.escaped_key("s>", stand_ins)
    assert control.fully_escaped("user", stand_ins) == "user" and control.fully_escaped("ab", stand_ins) == "ab"
    escaped = control.fully_escaped("a<b]c", stand_ins)
    assert (escaped[0], escaped[2], escaped[4]) == ("a", "b", "c") and not set("<]") & set(escaped)
    assert stand_ins.put_back(escaped) == "a<b]c"
    shown = json.dumps(stand_ins.of("<"))[1:-1]
    assert stand_ins.put_back(f"{shown} <") == "< <"
