"""Pictures in requests: the data that clients send, and its preparation for one model.

Data comes within the request. An address is never fetched: a server that does so reads what only it can reach (SSRF).
"""

from __future__ import annotations

import base64
import binascii
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bessemer.core.errors import RequestError
from bessemer.inference.engine import Engine
from bessemer.model.vision.pictures import read_picture
from bessemer.model.vision.preprocessing import Prepared
from bessemer.serving.config import IMAGES

_DATA_URI = re.compile(r"data:(image/[\w.+-]{1,64})?(;[\w=.+-]{1,64})*;base64,", re.ASCII | re.IGNORECASE)
#: A picture takes many times the memory of its file while it is read, so one is read at a time.
_READING = threading.Lock()


@dataclass(frozen=True)
class ImageData:
    """A picture as it came: the bytes of its file."""

    data: bytes = field(repr=False)


def image_of_uri(uri: Any) -> ImageData:
    """The data of a `data:` URI. Raises ValueError for an address, and for what is not base64."""
    if not isinstance(uri, str):
        raise ValueError(f"a picture is a text, 'data:image/png;base64,…', got {type(uri).__name__}")
    match = _DATA_URI.match(uri)
    if match is None:
        raise ValueError("a picture is sent as 'data:image/png;base64,…'; this server fetches no addresses")
    return image_of_base64(uri[match.end() :])


def image_of_base64(text: Any) -> ImageData:
    """The data of a text in base64. Raises ValueError."""
    if not isinstance(text, str):
        raise ValueError(f"a picture's data is a text in base64, got {type(text).__name__}")
    try:
        return ImageData(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError):
        raise ValueError("a picture's data is not base64") from None


def prepared_pictures(messages: Sequence[Mapping[str, Any]], engine: Engine) -> list[Prepared]:
    """The pictures of a conversation in the form of chat completions, in their order, as the model reads them.

    Raises RequestError for a model that reads none, for more than `IMAGES`, for more than the context holds, and as
    `read_picture`.
    """
    data = list(_images_in(messages))
    if not data:
        return []
    reader = engine.pictures
    if reader is None:
        raise RequestError("this model reads no pictures; leave them out, or take a model that does")
    if len(data) > IMAGES.most:
        raise RequestError(f"the conversation has {len(data):,} pictures, at most {IMAGES.most:,} are read")
    prepared, tokens = [], 0
    for number, one in enumerate(data, start=1):
        with _READING:
            prepared.append(reader.preprocessor.prepare(read_picture(one.data, f"picture {number}")))
        tokens += len(reader.tokens(prepared[-1]))
        if tokens >= engine.context_length:
            raise RequestError(
                f"this model's context is {engine.context_length} tokens, and the first {number} pictures take {tokens}"
            )
    return prepared


def _images_in(messages: Sequence[Mapping[str, Any]]) -> Iterator[ImageData]:
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if part.get("type") == "image":
                yield part["image"]


def text_of(content: Any) -> str:
    """The text of a content: of parts, theirs."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part.get("type") == "text")
    return content or ""
