"""Our server beside llama.cpp's: SmolLM2-135M-Instruct at 4 bits, 8 and 32 clients at once, two threads, over HTTP.

    python benchmarks/servers.py [--peer BUILD/bin/llama-server] [--streams 8 32] [--rounds 5]

Both servers take the same requests from the same client in turn: so many prompts of 126 tokens at once, greedy, 64 tokens of
answer each, nothing of a prefix reused. What counts is the tokens of all answers by the time until the last has come, the
median of the rounds; the models are those of `benchmarks/inference.py`. Build the peer on this machine (`cmake
-DGGML_NATIVE=ON`, target `llama-server`): one without AVX-512 on a processor that has it is refused.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx

import inference as models
from bessemer.core.environment import host

PROMPT, ANSWER, GOAL = 126, 64, 1.5


class Server(NamedTuple):
    """A server that answers `/v1/completions`."""

    name: str
    process: subprocess.Popen[str]
    client: httpx.Client

    def answer(self, prompt: list[int]) -> int:
        """Tokens of one answer."""
        body = {"model": self.name, "prompt": prompt, "max_tokens": ANSWER, "temperature": 0, "ignore_eos": True}
        reply = self.client.post("/v1/completions", json=body)
        reply.raise_for_status()
        return int(reply.json()["usage"]["completion_tokens"])

    def rate(self, prompts: list[list[int]]) -> float:
        """Tokens a second of all answers, asked for at once."""
        with ThreadPoolExecutor(len(prompts)) as clients:
            start = time.perf_counter()
            made = sum(clients.map(self.answer, prompts))
            seconds = time.perf_counter() - start
        assert made == ANSWER * len(prompts), made
        return made / seconds

    def end(self) -> None:
        """Stop it."""
        self.process.terminate()
        self.process.wait(20)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def start(name: str, command: list[str], health: str, log: Path, streams: int) -> Server:
    """Start a server and wait until it is healthy."""
    port = free_port()
    with log.open("w") as out:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=out, stderr=subprocess.STDOUT, text=True)
    limits = httpx.Limits(max_connections=streams, max_keepalive_connections=streams)
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300, limits=limits)
    for _ in range(600):
        if process.poll() is not None:
            raise SystemExit(f"{name} ended: {log.read_text()[-2000:]}")
        try:
            if client.get(health).status_code == 200:
                return Server(name, process, client)
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    process.kill()
    raise SystemExit(f"{name} did not come up: {log.read_text()[-2000:]}")


def check_peer(peer: Path, model: Path) -> str:
    """What the peer says it was built with, once and loudly. Refuses one that is not what people run."""
    command = [str(peer), "--model", str(model), "--port", str(free_port()), "--verbosity", "4"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        about = next((line for line in process.stdout if "system_info" in line), "it says no system_info")
        process.kill()
    if "avx512f" in Path("/proc/cpuinfo").read_text() and "AVX512 = 1" not in about:
        raise SystemExit(f"this llama-server was built without AVX-512, which the processor has: {about}")
    return about[about.find("system_info") :].strip()


def compare(streams: int, rounds: int, threads: int, peer: Path) -> dict[str, Any]:
    """Both servers in turn with so many clients."""
    work = models.WORK
    ours_path, peer_path = models.prepare(work, "int4"), models.prepare(work, "Q4_0")
    print(f"  {check_peer(peer, peer_path)}")
    own = [sys.executable, "-m", "bessemer", "serve", str(ours_path), "--threads", str(threads), "--no-prefix-cache"]
    others = [str(peer), "--model", str(peer_path), "--threads", str(threads), "--parallel", str(streams)]
    others += ["--ctx-size", str(256 * streams), "--no-cache-prompt"]
    servers = [
        start("ours", [*own, "--name", "ours", "--max-running", str(streams)], "/health", work / "ours.log", streams),
        start("llama-server", others, "/health", work / "peer.log", streams),
    ]
    try:
        prompts = models.windows(models.text_tokens(work), streams, PROMPT)
        rates: list[list[float]] = [[], []]
        for number in range(rounds + 1):  # the first warms
            for found, server in zip(rates, servers, strict=True):
                rate = server.rate(prompts)
                if number:
                    found.append(rate)
    finally:
        for server in servers:
            server.end()
    ours, theirs = map(statistics.median, rates)
    for server, found in zip(servers, rates, strict=True):
        print(f"  {server.name}: {statistics.median(found):.0f} tokens/s ({', '.join(f'{rate:.0f}' for rate in found)})")
    print(f"  ratio {ours / theirs:.2f}, asked {GOAL}")
    name = f"server_streams_{streams}"
    return {"name": name, "unit": "tokens/s", "bessemer": ours, "peer": theirs, "ratio": ours / theirs, "machine": host()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="llama-server, built on this machine; absent: the one on the PATH")
    parser.add_argument("--streams", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bessemer-inference")
    arguments = parser.parse_args()
    peer = arguments.peer or shutil.which("llama-server")
    if peer is None:
        raise SystemExit("llama-server is not on the PATH: give --peer FILE")
    models.WORK = arguments.work
    models.WORK.mkdir(parents=True, exist_ok=True)
    results = []
    for streams in arguments.streams:
        print(f"{streams} clients:")
        results.append(compare(streams, arguments.rounds, arguments.threads, Path(peer)))
    for result in results:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
