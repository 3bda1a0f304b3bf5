"""Process that runs trafilatura on one page after the other, so that it can be ended (`peers.py`).

Over the pipes goes, both ways, the length as eight bytes and then that many bytes of JSON.
"""

from __future__ import annotations

import json
import sys
from typing import BinaryIO


def send(stream: BinaryIO, message: object) -> None:
    """Writes one message."""
    body = json.dumps(message).encode()
    stream.write(len(body).to_bytes(8, "big") + body)
    stream.flush()


def main() -> None:
    """Answers until the other side closes its pipe."""
    from trafilatura import extract

    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    # a stray print must not end up in an answer
    sys.stdout = sys.stderr
    while len(size := requests.read(8)) == 8:
        asked = json.loads(requests.read(int.from_bytes(size, "big")))
        try:
            answer: object = extract(asked["html"], url=asked["url"], include_comments=False) or ""
        except Exception as error:  # whatever a page makes it raise
            answer = {"error": f"{type(error).__name__}: {error}"}
        send(answers, answer)


if __name__ == "__main__":
    main()
