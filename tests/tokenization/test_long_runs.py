import json
import random
from itertools import count

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.tokenization import fast
from bessemer.tokenization.bpe import byte_level_bpe, train_bpe
from bessemer.tokenization.fast import FastokensEncoder, TokenizersEncoder, Windows
from bessemer.tokenization.folder import TOKENIZER_FILE, write_folder
from bessemer.tokenization.split import SPLIT_REGEXES
from bessemer.tokenization.tokenizer import load_tokenizer
from tests.cases import slow_but

KINDS = ["abAé", "日本のカ한", "שأЖ", "-=.!", "👍🏽-", " ", "\n", "0123"]


@st.composite
def with_runs(draw):
    """Text with runs of one kind of character, long beside a window of 32, and what may stand around them."""
    around = st.lists(
        st.sampled_from(["a", "'", "'s", "!", "! ", "1", " ", "\n", "\r\n", "\t", "e\u0301", "\u0301"]), max_size=3
    )
    parts = ["".join(draw(around))]
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(KINDS))
        seed, length = draw(st.integers(0, 9)), draw(st.sampled_from([9, 150, 300, 500]))
        parts += ["".join(random.Random(seed).choices(kind, k=length)), "".join(draw(around))]
    return "".join(parts)


@pytest.fixture(scope="module", params=slow_but(["gpt-2", "qwen35"], sorted(SPLIT_REGEXES)))
def path(request, tmp_path_factory):
    """A vocabulary with long tokens of each kind, so that some windows of 32 characters do not meet."""
    folder = tmp_path_factory.mktemp(request.param)
    draw = random.Random(0)
    corpus = ["".join(draw.choices(kind, k=draw.randint(1, 12))) for kind in KINDS * 20]
    corpus += [a + b + "x " + a for a in corpus for b in ("'s", "\n", "  ")]
    tokens = train_bpe(corpus, 300, r"(?s).+")
    write_folder(folder, byte_level_bpe(tokens, request.param))
    return folder / TOKENIZER_FILE


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(fast, "_WINDOW", 32)
    monkeypatch.setattr(fast, "_OVERLAP", 12)
    monkeypatch.setattr(fast, "LONG_TEXT", 20)


def whole(path):
    reference = tokenizers.Tokenizer.from_file(str(path))
    return lambda text: np.array(reference.encode(text, add_special_tokens=False).ids, np.uint32)


def test_windows_give_the_ids_of_the_whole(path, small_windows):
    encode, used = whole(path), []
    encoders = [TokenizersEncoder(path), FastokensEncoder(path)]

    @given(with_runs())
    @settings(max_examples=60, deadline=None, derandomize=True)
    def as_the_whole(text):
        expected = encode(text)
        ids = encoders[0].windows.encode(text, encode)
        used.append(ids is not None)
        assert ids is None or ids.tolist() == expected.tolist()
        for encoder in encoders:
            assert encoder.encode_flat(["a", text, "b"])[0].tolist() == [*encode("a"), *expected, *encode("b")]

    as_the_whole()
    assert any(used)


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_run_is_never_encoded_in_one(path, kind, monkeypatch):
    monkeypatch.setattr(fast, "_WINDOW", 1000)
    monkeypatch.setattr(fast, "_OVERLAP", 100)
    if kind == "0123" and TokenizersEncoder(path).split != "gpt-2":
        return  # digits are short pieces
    text = "".join(random.Random(0).choices(kind, k=10_000))
    encode, longest = whole(path), []

    def counted(window):
        longest.append(len(window))
        return encode(window)

    ids = TokenizersEncoder(path).windows.encode("x " + text + "x", counted)
    assert ids.tolist() == encode("x " + text + "x").tolist()
    assert max(longest) < 3000


def test_windows_that_do_not_meet_leave_the_text_to_the_encoder(small_windows):
    windows = Windows("qwen2", np.ones(2, np.int64))

    def with_other_ids_in(odd):
        calls = count()
        ids = windows.encode("a" * 200, lambda window: np.full(len(window), int(next(calls) == odd)))
        return ids, next(calls)

    ids, calls = with_other_ids_in(None)
    assert ids.tolist() == [0] * 200
    assert calls > 5
    assert all(with_other_ids_in(odd)[0] is None for odd in range(1, calls))
    assert windows.encode("a" * 200, lambda window: np.zeros(len(window) - 1, np.int64)) is None  # a byte without a token


def test_a_window_begins_with_a_whole_character(small_windows):
    text = "日👍a-" * 3 + "👍" * 500
    ids = Windows("qwen2", np.ones(256, np.int64)).encode(text, lambda window: np.frombuffer(window.encode(), np.uint8))
    assert ids.tobytes() == text.encode()


@pytest.mark.parametrize("path", slow_but(["gpt-2"], sorted(SPLIT_REGEXES)), indirect=True)
def test_a_tokenizer_encodes_a_long_text_as_the_library_does_in_one(path):
    for text in ("ab" * 140_000 + " 'sé\n", "Some words, and 12 more.\n" * 12_000):
        assert len(text) > fast.LONG_TEXT
        tokenizer = load_tokenizer(path.parent)
        assert tokenizer.encode(text) == [tokenizer.bos_id, *whole(path)(text).tolist()]


def test_only_a_byte_level_bpe_is_encoded_in_windows(path, tmp_path):
    description = json.loads(path.read_text(encoding="utf-8"))
    assert TokenizersEncoder(path).windows is not None
    (tmp_path / TOKENIZER_FILE).write_text(json.dumps({**description, "normalizer": {"type": "NFC"}}), encoding="utf-8")
    assert TokenizersEncoder(tmp_path / TOKENIZER_FILE).windows is None
