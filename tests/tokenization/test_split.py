import json

import pytest
import regex
import rustbpe
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.tokenization import split as splits
from bessemer.tokenization.bpe import byte_level_bpe, train_bpe, without_lookahead_first
from bessemer.tokenization.fast import FastokensEncoder, TokenizersEncoder, agree
from bessemer.tokenization.folder import TOKENIZER_FILE, write_folder
from bessemer.tokenization.split import APPROXIMATED_REGEXES, OTHER_NAMES, SPLIT_REGEXES, pre_tokenizer, split_name
from tests.cases import slow_but

KNOWN = {**SPLIT_REGEXES, **APPROXIMATED_REGEXES}
GPT2 = SPLIT_REGEXES["gpt-2"]

#: Characters and short strings at which the regexes decide.
PARTS = [
    *("a", "B", "é", "İ", "ß", "ʰ", "ǅ", "日本", "한", "हिन्दी", "ไทย", "e\u0301", "\u0301", "\U0001d400"),
    *("1", "23", "٣", "½", "Ⅻ", "³"),
    *(" ", "  ", "\n", "\r\n", "\r", "\t", "\u00a0", "\u3000", "\u0085", "\u2028", "\u200b"),
    *("'s", "'S", "'ll", "'VE", "'", "’s", "'\u017f", "\u212a"),
    *(
        ".",
        "-",
        "/",
        "//",
        "_",
        "$",
        "+",
        "👍🏽",
        "👩‍👩‍👧",
        "\x00",
        "\x1b",
        "\U000e0041",
        "\ufffd",
        "camelCase",
        "HTMLParser's",
    ),
]
texts = st.lists(st.sampled_from(PARTS), max_size=14).map("".join)


def cut_in_steps(text, *regexes):
    """Pieces of pieces: each regex isolates its matches in what the one before left."""
    pieces = [text]
    for one in regexes:
        pieces = [part for piece in pieces for part in regex.split(f"({one})", piece) if part]
    return pieces


@given(texts)
@settings(max_examples=300, deadline=None)
def test_smollm_is_one_regex_for_digits_alone_and_then_gpt_2(text):
    assert regex.findall(SPLIT_REGEXES["smollm"], text) == cut_in_steps(text, r"\p{N}", GPT2)


@given(texts)
@settings(max_examples=300, deadline=None)
def test_published_spellings_cut_as_the_regex_they_are_taken_for(text):
    for regexes, name in splits._STEPS.items():
        assert cut_in_steps(text, *regexes) == regex.findall(KNOWN[name], text)


@given(texts)
@settings(max_examples=100, deadline=None)
def test_python_and_tokenizers_cut_alike_and_leave_nothing_between_the_pieces(text):
    for one in KNOWN.values():
        pieces = regex.findall(one, text)
        isolated = tokenizers.pre_tokenizers.Split(tokenizers.Regex(one), "isolated").pre_tokenize_str(text)
        assert pieces == [piece for piece, _ in isolated]
        assert pieces == regex.findall(without_lookahead_first(one), text)
        assert "".join(pieces) == text


@pytest.fixture(scope="module", params=slow_but(["gpt-2", "qwen35"], sorted(SPLIT_REGEXES)))
def three_engines(request, tmp_path_factory):
    """rustbpe, tokenizers and fastokens on one vocabulary, in which every pair of parts that may merge has merged."""
    corpus = [a + b for a in PARTS for b in PARTS]
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(corpus), 256 + 200, 8192, SPLIT_REGEXES[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    write_folder(folder, byte_level_bpe(train_bpe(corpus, 200, SPLIT_REGEXES[request.param]), request.param))
    return trainer, TokenizersEncoder(folder / TOKENIZER_FILE), FastokensEncoder(folder / TOKENIZER_FILE)


def test_trainer_tokenizers_and_fastokens_cut_alike(three_engines):
    trainer, reference, fast = three_engines

    @given(st.lists(texts, min_size=20, max_size=20))
    @settings(max_examples=20, deadline=None)
    def encode_alike(many):
        ids, _ = reference.encode_flat(many)
        assert ids.tolist() == [id for text in many for id in trainer.encode(text)]
        assert agree(fast, reference, many)

    encode_alike()


@pytest.mark.parametrize(
    ("split", "pieces"),
    [
        ("gpt-2", ["I", "'m", " 12345", " ×", "\n\n"]),
        ("llama-bpe", ["I", "'m", " ", "123", "45", " ×\n\n"]),
        ("qwen2", ["I", "'m", " ", "1", "2", "3", "4", "5", " ×\n\n"]),
        ("qwen35", ["I", "'m", " ", "1", "2", "3", "4", "5", " ×\n\n"]),
        ("smollm", ["I", "'m", " ", "1", "2", "3", "4", "5", " ×", "\n\n"]),
        ("gpt-4o", ["I'm", " ", "123", "45", " ×\n\n"]),
        ("tekken", ["I", "'m", " ", "1", "2", "3", "4", "5", " ×\n\n"]),
    ],
)
def test_the_named_regexes_cut_digits_and_line_ends_as_their_models_do(split, pieces):
    assert regex.findall(KNOWN[split], "I'm 12345 ×\n\n") == pieces


def test_marks_belong_to_their_word_in_three_of_them():
    assert {name for name, one in KNOWN.items() if regex.findall(one, "हिन्दी") == ["हिन्दी"]} == {"qwen35", "gpt-4o", "tekken"}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES_ONLY = {**BYTE_LEVEL, "use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


def cut(pattern, behavior="Isolated", invert=False):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


@pytest.mark.parametrize(
    ("published", "name"),
    [
        (BYTE_LEVEL, "gpt-2"),
        (sequence(BYTE_LEVEL), "gpt-2"),
        (sequence(DIGITS, BYTE_LEVEL), "smollm"),  # SmolLM2, StarCoder
        (sequence(cut(SPLIT_REGEXES["qwen2"]), BYTES_ONLY), "qwen2"),
        (sequence(cut(SPLIT_REGEXES["llama-bpe"], "Removed", invert=True), BYTES_ONLY), "llama-bpe"),  # GPT-4's
        (sequence(cut(APPROXIMATED_REGEXES["gpt-4o"]), BYTES_ONLY), "gpt-4o"),
        (None, None),
        (BYTES_ONLY, None),  # no cut at all
        ({**BYTE_LEVEL, "add_prefix_space": True}, None),
        ({"type": "ByteLevel"}, None),  # a space is put before the text where nothing else is said
        ({"type": "ByteLevel", "add_prefix_space": False}, "gpt-2"),  # and its regex is used
        (sequence(cut(SPLIT_REGEXES["qwen2"]), BYTE_LEVEL), None),  # cuts twice
        (sequence({**DIGITS, "individual_digits": False}, BYTE_LEVEL), None),
        (sequence(cut(r"\p{N}", "Removed", invert=True), BYTE_LEVEL), None),
        (sequence(cut(SPLIT_REGEXES["qwen2"], "MergedWithNext"), BYTES_ONLY), None),
        (sequence(cut(r"\s+"), BYTES_ONLY), None),
        ({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}, None),
    ],
)
def test_a_published_pre_tokenizer_has_llama_cpps_name_or_none(published, name):
    assert split_name(published) == name


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_what_we_write_has_the_name_it_was_written_for(name):
    assert split_name(pre_tokenizer(name)) == name
    model = {"type": "BPE", "vocab": {}, "merges": []}
    written = {"version": "1.0", "added_tokens": [], "pre_tokenizer": pre_tokenizer(name), "model": model}
    read_and_saved = json.loads(tokenizers.Tokenizer.from_str(json.dumps(written)).to_str())
    assert split_name(read_and_saved["pre_tokenizer"]) == name


def test_every_other_name_is_of_a_split_we_have():
    assert set(OTHER_NAMES.values()) <= set(KNOWN)
    assert not set(OTHER_NAMES) & set(KNOWN)


def test_the_section_of_a_split_adds_and_trims_nothing():
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    assert pre_tokenizer("gpt-2") == byte_level | {"use_regex": True}
    isolated = {"type": "Split", "pattern": {"Regex": KNOWN["smollm"]}, "behavior": "Isolated", "invert": False}
    assert pre_tokenizer("smollm") == {"type": "Sequence", "pretokenizers": [isolated, byte_level | {"use_regex": False}]}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
CUT = {"type": "Split", "pattern": {"Regex": KNOWN["smollm"]}, "behavior": "Isolated", "invert": False}
DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([], None),
        ([CUT], None),
        ([CUT, BYTES], "smollm"),
        ([CUT, BYTES | {"add_prefix_space": True}], None),
        ([CUT, {"type": "ByteLevel", "use_regex": False}], None),
        ([BYTES | {"use_regex": True}], "gpt-2"),
        ([{"type": "ByteLevel", "add_prefix_space": False}], "gpt-2"),
        ([BYTES], None),
        ([DIGITS, BYTES | {"use_regex": True}], "smollm"),
        ([DIGITS | {"individual_digits": False}, BYTES | {"use_regex": True}], None),
        ([CUT | {"behavior": "Removed", "invert": True}, BYTES], "smollm"),
        ([CUT | {"behavior": "Removed"}, BYTES], None),
        ([CUT | {"behavior": "MergedWithPrevious", "invert": True}, BYTES], None),
        ([CUT | {"pattern": {"String": " "}}, BYTES], None),
        ([CUT | {"type": "Punctuation"}, BYTES], None),
        (
            [
                CUT | {"pattern": {"Regex": r"\p{N}"}, "behavior": "Removed", "invert": True},
                BYTES | {"use_regex": True},
            ],
            None,
        ),
    ],
)
def test_only_steps_that_cut_as_a_known_split_have_its_name(steps, name):
    assert split_name({"type": "Sequence", "pretokenizers": steps}) == name
    if len(steps) == 1:
        assert split_name(steps[0]) == name
    assert split_name(None) is None
