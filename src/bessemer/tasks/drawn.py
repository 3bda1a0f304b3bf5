"""Pictures drawn from a seed, with questions whose answers are known: shape, colour, place, number, and a written word.

Every picture is its own: places, sizes, colours, the ground and its noise are drawn. Answers of a question are equally
frequent, so that a model that does not see the picture is right as often as chance says.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bessemer.core.hashing import derive_seed

Question = Literal["shape", "colour", "place", "number", "word"]
QUESTIONS: tuple[Question, ...] = ("shape", "colour", "place", "number", "word")
#: What is asked; the answers; and those of each question.
ASKED: dict[Question, str] = {
    "shape": "Which shape is it?",
    "colour": "What colour is it?",
    "place": "Where is it?",
    "number": "How many are there?",
    "word": "What is written?",
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
#: By name, their red, green and blue.
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 200, 30),
    "purple": (150, 50, 180),
    "white": (245, 245, 245),
}
PLACES = tuple(f"{row} {column}".strip() for row in ("top", "middle", "bottom") for column in ("left", "centre", "right"))
NUMBERS = ("one", "two", "three", "four", "five")
WORDS = ("sun", "map", "fox", "key", "hat", "bed", "ice", "oak", "jar", "log", "pen", "tub")
ANSWERS: dict[Question, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "place": PLACES,
    "number": NUMBERS,
    "word": WORDS,
}

Pixels = NDArray[np.uint8]

#: Points that a pixel is the mean of, along a side.
_FINE = 4
#: Letters of 5 × 7 points, row by row.
_LETTERS = {
    "a": "01110 10001 10001 11111 10001 10001 10001",
    "b": "11110 10001 10001 11110 10001 10001 11110",
    "c": "01110 10001 10000 10000 10000 10001 01110",
    "d": "11110 10001 10001 10001 10001 10001 11110",
    "e": "11111 10000 10000 11110 10000 10000 11111",
    "f": "11111 10000 10000 11110 10000 10000 10000",
    "g": "01110 10001 10000 10111 10001 10001 01111",
    "h": "10001 10001 10001 11111 10001 10001 10001",
    "i": "01110 00100 00100 00100 00100 00100 01110",
    "j": "00111 00010 00010 00010 00010 10010 01100",
    "k": "10001 10010 10100 11000 10100 10010 10001",
    "l": "10000 10000 10000 10000 10000 10000 11111",
    "m": "10001 11011 10101 10101 10001 10001 10001",
    "n": "10001 11001 10101 10011 10001 10001 10001",
    "o": "01110 10001 10001 10001 10001 10001 01110",
    "p": "11110 10001 10001 11110 10000 10000 10000",
    "r": "11110 10001 10001 11110 10100 10010 10001",
    "s": "01111 10000 10000 01110 00001 00001 11110",
    "t": "11111 00100 00100 00100 00100 00100 00100",
    "u": "10001 10001 10001 10001 10001 10001 01110",
    "x": "10001 10001 01010 00100 01010 10001 10001",
    "y": "10001 10001 01010 00100 00100 00100 00100",
}


class DrawnPicture(NamedTuple):
    """A picture, (side, side, 3), and the answers to the questions that it is about."""

    pixels: Pixels
    answers: dict[Question, str]


class DrawnItem(NamedTuple):
    """A picture as a PNG file, the kind of question, what is asked, and the answer."""

    png: bytes
    kind: Question
    question: str
    answer: str


def drawn_items(count: int, seed: int, *, about: Sequence[Question] = QUESTIONS, side: int = 32) -> list[DrawnItem]:
    """Items of these questions by turns, each with a picture of its own. A larger count begins with the same items."""
    generator = np.random.default_rng(derive_seed(seed, "drawn pictures", side))
    items: list[DrawnItem] = []
    while len(items) < count:
        kind = about[len(items) % len(about)]
        picture = _DRAWN[kind](generator, side)
        items.append(DrawnItem(png_of(picture.pixels), kind, ASKED[kind], picture.answers[kind]))
    return items


def blank_png(side: int = 32) -> bytes:
    """A grey picture, for a model that is to see nothing."""
    return png_of(np.full((side, side, 3), 128, np.uint8))


def png_of(pixels: Pixels) -> bytes:
    """The bytes of a PNG file of (height, width, 3) pixels (ISO/IEC 15948; every row with filter 0)."""
    height, width, _ = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, width * 3)], axis=1)
    stream = io.BytesIO(b"")
    stream.write(b"\x89PNG\r\n\x1a\n")
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")):
        stream.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))
    return stream.getvalue()


# -- inside


def _of_one(generator: np.random.Generator, side: int) -> DrawnPicture:
    shape, colour, place = (_one_of(generator, answers) for answers in (SHAPES, tuple(COLOURS), PLACES))
    row, column = divmod(PLACES.index(place), 3)
    canvas, radius = _ground(generator, side), generator.uniform(0.13, 0.165) * side
    middle = (np.array([row, column]) + 0.5) * side / 3 + generator.uniform(-0.04, 0.04, 2) * side
    _draw(canvas, shape, middle, radius, colour, generator)
    return DrawnPicture(_with_noise(canvas, generator), {"shape": shape, "colour": colour, "place": place})


def _of_several(generator: np.random.Generator, side: int) -> DrawnPicture:
    number = int(generator.integers(len(NUMBERS)))
    canvas = _ground(generator, side)
    for cell in generator.permutation(9)[: number + 1]:
        row, column = divmod(int(cell), 3)
        middle = (np.array([row, column]) + 0.5) * side / 3 + generator.uniform(-0.03, 0.03, 2) * side
        radius, shape = generator.uniform(0.1, 0.13) * side, _one_of(generator, SHAPES)
        _draw(canvas, shape, middle, radius, _one_of(generator, tuple(COLOURS)), generator)
    return DrawnPicture(_with_noise(canvas, generator), {"number": NUMBERS[number]})


def _of_a_word(generator: np.random.Generator, side: int) -> DrawnPicture:
    word, colour = _one_of(generator, WORDS), _one_of(generator, tuple(COLOURS))
    glyphs = [np.array([[int(point) for point in row] for row in _LETTERS[letter].split()], bool) for letter in word]
    line = np.concatenate([np.pad(glyph, ((0, 0), (0, 1))) for glyph in glyphs], axis=1)[:, :-1]
    scale = side // 32
    line = np.kron(line, np.ones((scale, scale), bool))
    canvas, (tall, wide) = _ground(generator, side), line.shape
    top, left = (int(generator.integers((side - size) // 4, 3 * (side - size) // 4 + 1)) for size in (tall, wide))
    _paint(canvas, np.kron(line, np.ones((_FINE, _FINE), bool)), np.array([top, left]), colour, generator)
    return DrawnPicture(_with_noise(canvas, generator), {"word": word})


def _one_of(generator: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[int(generator.integers(len(names)))]


def _ground(generator: np.random.Generator, side: int) -> NDArray[np.float64]:
    """A dark ground, (side, side, 3), of a colour of its own."""
    return np.broadcast_to(generator.uniform(0, 60, 3), (side, side, 3)).copy()


def _draw(
    canvas: NDArray[np.float64],
    shape: str,
    middle: NDArray[np.float64],
    radius: float,
    colour: str,
    generator: np.random.Generator,
) -> None:
    """A shape, each of whose pixels is as much its colour as its fine points are in it."""
    side = canvas.shape[0]
    first = np.maximum(0, np.floor(middle - radius)).astype(int)
    end = np.minimum(side, np.ceil(middle + radius)).astype(int)
    below, right = (
        (np.arange((end[axis] - first[axis]) * _FINE) + 0.5) / _FINE + first[axis] - middle[axis] for axis in (0, 1)
    )
    _paint(canvas, _MASKS[shape](below[:, None], right[None, :], radius), first, colour, generator)


def _paint(
    canvas: NDArray[np.float64],
    mask: NDArray[np.bool_],
    first: NDArray[np.int_],
    colour: str,
    generator: np.random.Generator,
) -> None:
    """mask: of fine points, from the pixel `first`, its row and column."""
    tall, wide = (size // _FINE for size in mask.shape)
    cover = mask.reshape(tall, _FINE, wide, _FINE).mean((1, 3))[..., None]
    paint = np.clip(np.array(COLOURS[colour]) + generator.uniform(-12, 12, 3), 0, 255)
    part = canvas[first[0] : first[0] + tall, first[1] : first[1] + wide]
    part[:] = part * (1 - cover) + paint * cover


def _with_noise(canvas: NDArray[np.float64], generator: np.random.Generator) -> Pixels:
    return np.clip(canvas + generator.normal(0, 4, canvas.shape), 0, 255).astype(np.uint8)


#: What draws the picture that a question is about.
_DRAWN: dict[Question, Callable[[np.random.Generator, int], DrawnPicture]] = {
    "shape": _of_one,
    "colour": _of_one,
    "place": _of_one,
    "number": _of_several,
    "word": _of_a_word,
}
#: Which points are in a shape: from how far each is below and to the right of the middle, in pixels, and the radius.
_Mask = Callable[[NDArray[np.float64], NDArray[np.float64], float], NDArray[np.bool_]]


def _square(below: NDArray[np.float64], right: NDArray[np.float64], radius: float) -> NDArray[np.bool_]:
    return (np.abs(below) < 0.9 * radius) & (np.abs(right) < 0.9 * radius)


def _triangle(below: NDArray[np.float64], right: NDArray[np.float64], radius: float) -> NDArray[np.bool_]:
    return (np.abs(below) < radius) & (2 * np.abs(right) < below + radius)


def _cross(below: NDArray[np.float64], right: NDArray[np.float64], radius: float) -> NDArray[np.bool_]:
    within = (np.abs(below) < radius) & (np.abs(right) < radius)
    return within & (np.minimum(np.abs(below), np.abs(right)) < 0.32 * radius)


_MASKS: dict[str, _Mask] = {
    "circle": lambda below, right, radius: np.hypot(below, right) < radius,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "ring": lambda below, right, radius: np.abs(np.hypot(below, right) - 0.775 * radius) < 0.225 * radius,
}
