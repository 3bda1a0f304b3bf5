"""What one client can do to another: a server under requests at 1 and 10 times each of its limits.

    python benchmarks/server_limits.py quickstart [--runs runs] [--minutes 60] [--most-seconds 1]

Starts `bessemer serve MODEL`. Of each limit (`bessemer/serving/config.py`) it sends a request that comes to it and one ten
times as large, a conversation of 7 MB besides, and meanwhile a second client looks at `/health` and asks for a chat of one
token, again and again. Then responses to be stored, and streams that nobody reads, of nearly as many answers as the server
computes at once. All of it is repeated for `--minutes`, and until the server stores as many responses as it ever does; its
memory is read after each round. A line of each case: the statuses, and the slowest answers of the second client.

It ends with an error where an answer was slower than `--most-seconds`, any status was 5xx, or the memory of the last round is
more than a tenth above that of the round in which the store was full. Nothing else may run meanwhile. Result:
`server_limits.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import httpx

import recording
from servers import Server, start

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.serving.limit_cases import CASES, FACTORS, Seen, Sent, case_of, long_prompt, send_beside_another

from bessemer.inference.config import EngineConfig
from bessemer.serving import config as limits

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = (
    "src/bessemer/serving",
    "src/bessemer/assistant",
    "src/bessemer/inference/sampling",
    "src/bessemer/inference/async_generation.py",
    "src/bessemer/tokenization/chat.py",
)
MODEL = "limited"
PLACES = EngineConfig().max_num_seqs
#: Streams that nobody reads.
STREAMS = 3
#: Responses that a round stores, and the rounds after which no more are kept: memory grows until then, by what it is for.
STORED = 64
FULL = -(-limits.STORED.most // STORED)
#: The most that the memory of the last round may be of that of the round in which the store was full.
MEMORY = 1.1


def resident(server: Server) -> float:
    """MiB of a server in memory."""
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def cases() -> dict[str, Sent]:
    """All requests, by what they are called."""
    most_at_once = PLACES + limits.WAITING.most - limits.WAITING.most // limits.OTHERS_SHARE
    found = {f"{name} × {factor}": case_of(name, factor, MODEL, most_at_once) for name in CASES for factor in FACTORS}
    stored = {"model": MODEL, "input": "x" * 100, "max_output_tokens": 1}
    return found | {"7 MB of words": long_prompt(MODEL), "stored": Sent("/v1/responses", json.dumps(stored).encode(), STORED)}


async def unread(url: str) -> Seen:
    """Streams that nobody reads, of nearly as many answers as are computed at once, with log-probabilities: more than waits in
    the system's buffers."""
    address = httpx.URL(url)
    wanted = {"n": (PLACES - 4) // STREAMS, "logprobs": True, "top_logprobs": 20, "ignore_eos": True, "stream": True}
    asked = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "a"}], **wanted}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(asked)}\r\n\r\n".encode()
    with ExitStack() as held:
        for _ in range(STREAMS):
            connection = held.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((address.host, address.port))
            connection.sendall(head + asked)
        return await send_beside_another(url, MODEL, case_of("STOPS", 1, MODEL, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--most-seconds", type=float, default=1.0)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "bessemer", "serve", arguments.model, "--runs", arguments.runs, "--name", MODEL]
    slowest: dict[str, tuple[float, float]] = {}
    statuses: Counter[int] = Counter()
    memory: list[float] = []
    until = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as folder:
        server = start("bessemer", command, Path(folder) / "log", {})
        try:
            while len(memory) <= FULL or time.monotonic() < until:
                for name, sent in cases().items():
                    seen = asyncio.run(send_beside_another(server.url, MODEL, sent))
                    tell(name, seen, slowest, statuses)
                tell("streams that are not read", asyncio.run(unread(server.url)), slowest, statuses)
                memory.append(resident(server))
                print(f"round {len(memory)}: {memory[-1]:,.0f} MiB", flush=True)
        finally:
            server.end()
    health, chat = (max(one[place] for one in slowest.values()) for place in (0, 1))
    figures = {
        "health_s": health,
        "chat_s": chat,
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "memory_mib": memory,
        "memory_full_mib": memory[FULL - 1],
        "memory_last_mib": memory[-1],
        "rounds": len(memory),
        "cases": {name: {"health_s": one[0], "chat_s": one[1]} for name, one in slowest.items()},
    }
    recording.save("server_limits", figures)
    print(json.dumps(figures))
    failed = {name: one for name, one in slowest.items() if max(one) > arguments.most_seconds}
    if failed or max(statuses) >= 500 or memory[-1] > MEMORY * memory[FULL - 1]:
        raise SystemExit(
            f"too slow: {failed}; statuses {dict(statuses)}; memory {memory[FULL - 1]:,.0f} to {memory[-1]:,.0f} MiB"
        )


def tell(name: str, seen: Seen, slowest: dict[str, tuple[float, float]], statuses: Counter[int]) -> None:
    """Show what came of a case, and keep the slowest."""
    before = slowest.get(name, (0.0, 0.0))
    slowest[name] = (max(before[0], seen.health), max(before[1], seen.chat))
    statuses.update([*seen.statuses, *seen.others])
    shown = " ".join(f"{status}×{count}" for status, count in sorted(Counter(seen.statuses).items()))
    print(f"{name:32} {shown:16} health {seen.health:.3f} s, chat {seen.chat:.3f} s", flush=True)


if __name__ == "__main__":
    main()
