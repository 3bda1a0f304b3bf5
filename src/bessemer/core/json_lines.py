"""JSON lines as they are written here: a value a line, with text as it is."""

from __future__ import annotations

import json
from typing import Any


def json_lines(text: str) -> list[Any]:
    """The values of JSON lines, empty lines left out. Raises json.JSONDecodeError for a line that is none.

    A line ends at a line feed alone: `str.splitlines` also breaks at U+2028, U+2029 and U+0085, which JSON writes as they are.
    """
    return [json.loads(line) for line in text.split("\n") if line.strip()]
