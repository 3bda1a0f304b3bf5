"""Strings that tokenizers get wrong, drawn from a seed: the same on every machine."""

import random
import unicodedata

_WORDS = (
    *("hello", "the", "tokenizer", "Größe", "naïve", "ελληνικά", "кириллица", "עִבְרִית", "العربية", "हिन्दी", "ไทย"),
    *("ქართული", "日本語", "中文", "한국어", "አማርኛ", "བོད་", "𐌰𐌱", "𝔘𝔫𝔦", "don't", "DON'T", "we'LL", "'ſ", "\u212a"),
)
_EMOJI = ["👩‍👩‍👧‍👦", "👍🏽", "🇩🇪🇫🇷", "❤️", "1️⃣", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "🤷🏿‍♀️", "\u200d", "\ufe0f"]
_NOT_NORMAL = [
    "e\u0301",
    "\u1e9b\u0323",
    "ﬁ",
    "\u1100\u1161\u11a8",
    "a\u0323\u0302\u0302\u0302",
    "\u212b",
    "㍿",
    "ｆｕｌｌ",
    "İ",
    "\u0344",
    "ǆ",
]
_SPACES = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2028", "\u3000", "\u200b", "\ufeff", "\u0085"]
_TYPED = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<unk>",
    "[UNK]",
    "<0x41>",
    "<0xE2>",
    "\u2581",
    "\u2581a",
    "##ing",
    "##",
    "<s>",
    "[CLS]",
]
_MARKS = list(".,;:!?'\"()[]{}<>/\\|@#$%^&*-_=+~`0123456789½Ⅻ٣")


def hostile_strings(count: int, seed: int = 11) -> list[str]:
    """`count` different strings of up to a thousand characters; the first is empty."""
    draw = random.Random(seed)
    strings = {"": None}
    while len(strings) < count:
        strings["".join(_piece(draw) for _ in range(draw.randint(1, 6)))] = None
    return list(strings)


def _piece(draw: random.Random) -> str:
    kind = draw.randrange(10)
    if kind == 0:
        return "".join(any_character(draw) for _ in range(draw.randint(1, 6)))
    if kind == 1:  # C0, DEL and C1
        return "".join(chr(draw.choice([*range(0x20), *range(0x7F, 0xA0)])) for _ in range(draw.randint(1, 4)))
    if kind == 2:
        character = draw.choice([*"a 1-\nZ", draw.choice(_SPACES), draw.choice(_EMOJI), any_character(draw)])
        return character * draw.choice([2, 3, 7, 30, 150])
    if kind == 3:
        return draw.choice(_EMOJI)
    if kind == 4:
        return draw.choice(_NOT_NORMAL)
    if kind == 5:
        return draw.choice(_TYPED)
    if kind == 6:
        return unicodedata.normalize("NFD", draw.choice(_WORDS)) + draw.choice(_SPACES)
    if kind == 7:
        return draw.choice(_SPACES) + "".join(draw.choices(_MARKS, k=draw.randint(1, 5)))
    return " ".join(draw.choices(_WORDS, k=draw.randint(1, 3)))


def any_character(draw: random.Random) -> str:
    """A code point of a plane drawn first, so that each of the 17 comes up; never a surrogate."""
    code = draw.randrange(17) << 16 | draw.randrange(0x10000)
    return chr(code) if not 0xD800 <= code < 0xE000 else any_character(draw)
