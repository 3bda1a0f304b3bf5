"""Decoding by the kernels of a wheel beside those that a compiler made on this machine, in one process and in turn.

    python -m build kernels --outdir WHEELS           # needs a compiler, and `build`
    python benchmarks/prebuilt_kernels.py WHEELS/bessemer_kernels-*.whl --work FOLDER [--rounds 20]
    python benchmarks/prebuilt_kernels.py WHEEL --work FOLDER --disturbed      # whatever else runs, without a result

The wheel is unpacked into a folder, and its libraries are chosen as `serve` chooses them. SmolLM2-135M in Q8_0 and Q4_K_M, two
engines of each file, one a library. Each round both write 32 tokens after the same prompt, and read 512. The times of
a round are neighbours, so ratios are of pairs. FOLDER keeps the files that llama.cpp's quantiser writes (`inference.py`).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import inference
import recording
from bessemer.model import cpu_kernels
from bessemer.model.cpu_kernels import prebuilt
from inference_engines import Ours, rates
from rounds import summary

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/model/cpu_kernels", "kernels")

FORMS = ("Q8_0", "Q4_K_M")
DECODED, PROMPT = 32, 512
WHATS = {"decode_1": DECODED, f"prompt_{PROMPT}": 1}


def libraries(wheel: Path, folder: Path) -> dict[str, Any]:
    """What `library()` gives with a compiler, and with the wheel alone."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    sys.path.insert(0, str(folder))
    found = prebuilt.installed()
    assert found is not None
    tier, path = prebuilt.choose(found, Path(cpu_kernels.__file__).parent, "native", prebuilt.features())
    return {
        "compiled": cpu_kernels._Outcome(cpu_kernels.build(), None, "compiled here"),
        "wheel": cpu_kernels._Outcome(cpu_kernels.load_prebuilt(path), None, f"{found}, {tier.name}"),
    }


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("wheel", type=Path)
    arguments.add_argument("--work", type=Path, required=True)
    arguments.add_argument("--rounds", type=int, default=20)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--forms", nargs="+", default=FORMS, choices=FORMS)
    arguments.add_argument("--disturbed", action="store_true")
    given = arguments.parse_args()
    figures: dict[str, Any] = {"threads": given.threads, "files": {}}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        outcomes = libraries(given.wheel, Path(folder))
        figures["wheel"] = outcomes["wheel"].origin
        for form in given.forms:
            found = compare(outcomes, inference.gguf_file(given.work, form), given)
            figures["files"][form] = found
            for what, of in found.items():
                rows.append([f"{form}, {what}", *(of[side]["median"] for side in outcomes), of["ratio"]["median"]])
                print(*rows[-1], f"ratios {min(of['ratio']['rounds']):.3f} to {max(of['ratio']['rounds']):.3f}", flush=True)
    print(
        json.dumps(
            {name: {what: of["ratio"]["median"] for what, of in each.items()} for name, each in figures["files"].items()}
        )
    )
    if not given.disturbed:
        table = recording.table(
            [("SmolLM2-135M, tokens/s", ""), ("compiled here", ",.0f"), ("wheel", ",.0f"), ("ratio of pairs", ".3f")], rows
        )
        recording.save("prebuilt_kernels", figures, tables={"speeds": table})


def compare(outcomes: dict[str, Any], path: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of one file by both libraries, and their ratios by round."""

    def use(side: str) -> None:
        cpu_kernels._outcome = lambda: outcomes[side]
        cpu_kernels.compute_by(outcomes[side].kernels)

    engines = {}
    for side in outcomes:
        use(side)
        engines[side] = Ours(path, given.threads, streams=1)
    prompts = {"decode_1": list(range(1000, 1032)), f"prompt_{PROMPT}": list(range(2000, 2000 + PROMPT))}
    found = {}
    for what, count in WHATS.items():
        speeds: dict[str, list[float]] = {side: [] for side in outcomes}
        for number in range(-1, given.rounds):
            if not given.disturbed and number % 5 == 0:
                inference.wait_until_quiet()
            for side in outcomes if number % 2 else reversed(outcomes):
                use(side)
                rate = rates(engines[side].run([prompts[what]], count, what), what)["rate"]
                # the first round warms up
                if number >= 0:
                    speeds[side].append(rate)
        ratios = [wheel / compiled for compiled, wheel in zip(speeds["compiled"], speeds["wheel"], strict=True)]
        found[what] = {side: summary(each) for side, each in speeds.items()} | {"ratio": summary(ratios)}
    return found


if __name__ == "__main__":
    main()
