"""Which pictures become rows: by what is said about them, and by what is to be seen.

A filter gives a reason to leave a picture out, or nothing. Those of texts are asked before a picture is read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bessemer.core.usercode import load_user_function
from bessemer.model.vision.pictures import Picture
from bessemer.posttraining.pictures.config import PicturesConfig
from bessemer.posttraining.pictures.near import EarlierPictures, Hashes, hashes_of, is_blank
from bessemer.posttraining.pictures.pages import PageText
from bessemer.posttraining.pictures.sources import Mention

#: The name of a file, of a camera's or of an address's; and a word. Of scripts without blanks a character is a word.
_FILE_NAME = re.compile(
    r"\S*\.(?:jpe?g|png|gif|webp|bmp|svg|tiff?|avif|heic)|(?:img|dsc[nf]?|pxl|screenshot)[-_ ]?\d[\w-]*", re.I
)
_ADDRESS = re.compile(r"(?:https?://|www\.)\S+", re.IGNORECASE)
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\d_](?:[\w'’-]*\w)?")
#: Marks of names that programs make: `header-image_2`.
_JOINED = re.compile(r"(?=\S*[-_])[\w-]+")


class TextFilters:
    """Chooses the text of a picture. Counts texts, of which a site's furniture has the same again and again."""

    def __init__(self, config: PicturesConfig) -> None:
        self._config = config
        self._boilerplate = frozenset(word.casefold() for word in config.boilerplate)
        self._seen: Counter[str] = Counter()

    def text_of(self, mention: Mention) -> tuple[PageText | None, str]:
        """The first of a picture's texts that may be kept, or None with the reason why its first may not."""
        reasons = []
        for text in mention.texts:
            reason = self._reason(text.text)
            if not reason:
                return text, ""
            reasons.append(reason)
        return None, reasons[0] if reasons else "no text"

    def is_repeated(self, text: str) -> bool:
        """Whether enough pictures with the same text were kept. Counts it, if not."""
        most = self._config.most_of_a_text
        key = text.casefold()
        if most is not None and self._seen[key] >= most:
            return True
        self._seen[key] += 1
        return False

    def _reason(self, text: str) -> str:
        words = [word.casefold() for word in _WORD.findall(_ADDRESS.sub("", text))]
        if _FILE_NAME.fullmatch(text) or _ADDRESS.fullmatch(text) or _JOINED.fullmatch(text):
            return "the name of a file"
        if words and sum(word in self._boilerplate for word in words) * 2 >= len(words):
            return "boilerplate"
        if len(words) < self._config.min_words:
            return "few words"
        if len(text) > self._config.max_characters:
            return "a long text"
        return "" if self._is_of_a_language(text) else "another language"

    def _is_of_a_language(self, text: str) -> bool:
        if not self._config.languages:
            return True
        import pyarrow as pa

        from bessemer.data.filters.language import language

        return language(pa.array([text]))["language"][0].as_py() in self._config.languages


def reason_of_page(mention: Mention, config: PicturesConfig) -> str:
    """Why nothing of its page is taken, or "" where it is."""
    if mention.opt_out and config.opted_out == "drop":
        return "opted out"
    return "another licence" if config.licenses and mention.license not in config.licenses else ""


class PixelFilters:
    """Judges pictures by what they show, each beside those before it."""

    def __init__(self, config: PicturesConfig) -> None:
        self._config = config
        self._earlier = None if config.near_duplicates is None else EarlierPictures(config.near_duplicates)
        #: Names of the pictures that were kept, by their numbers.
        self._names: list[str] = []

    def reason_of(self, picture: Picture) -> str:
        """Why a picture is left out whatever came before it; "" where it is not."""
        short, long = sorted((picture.width, picture.height))
        if short < self._config.min_side:
            return "small"
        if long > self._config.max_aspect * short:
            return "long"
        return "blank" if is_blank(picture) else ""

    def copied_from(self, picture: Picture) -> tuple[Hashes, str | None]:
        """The hashes of a picture, and the name of the kept one that it is a near-duplicate of."""
        hashes = hashes_of(picture)
        number = None if self._earlier is None else self._earlier.nearest(hashes)
        return hashes, None if number is None else self._names[number]

    def keep(self, hashes: Hashes, name: str) -> None:
        """Remember a picture that was kept."""
        if self._earlier is not None:
            self._earlier.add(hashes)
            self._names.append(name)


OwnFilter = Callable[[Mapping[str, Any]], str | None]


def own_filters(names: Sequence[str], folder: Path) -> list[tuple[str, OwnFilter]]:
    """A user's functions with their names. Raises ConfigError for what cannot be imported."""
    return [(name.rpartition(":")[2], load_user_function(name, folder)) for name in names]
