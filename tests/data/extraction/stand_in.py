"""A function that stands in for trafilatura. Its helper imports this file alone, which takes little time."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


def stand_in_text(html, url):
    """A page says what happens to who reads it."""
    action, _, rest = html.partition(" ")
    if action == "hang":
        while True:
            pass
    elif action == "wait":
        time.sleep(float(rest))
    elif action == "die":
        sys.exit(1)
    elif action == "fail":
        raise RecursionError("too deep")
    elif action in ("r", "w"):
        # opening a named pipe waits for somebody who opens its other end
        with Path(rest).open(action, encoding="utf-8"):
            pass
    return f"{os.getpid()}" if action in ("r", "w", "pid") else f"text of {html}"
