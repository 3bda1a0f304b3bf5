"""The quickstart from an empty folder and again: how long it takes, and what its model scores beside its baselines.

Takes about ten minutes on two cores. The last line is one JSON object: bits per byte of held-out packages against an
interpolated Witten–Bell byte 5-gram trained on the same bytes, in the same run.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bessemer.core.environment import host


def timed(*arguments: str, folder: Path) -> float:
    """Seconds of one `bessemer` command, its output passed through."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "bessemer", *arguments], cwd=folder, check=True)
    return time.perf_counter() - start


def fastest(*arguments: str, folder: Path, repeats: int = 5) -> float:
    """Seconds of the fastest of several runs of a quick command, its output dropped."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "bessemer", *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = timed("run", "quickstart", folder=folder)
        again = timed("run", "quickstart", folder=folder)
        stages = folder / "runs" / "quickstart" / "stages"
        seconds = {stage.name: json.loads((stage / "manifest.json").read_text())["seconds"] for stage in stages.iterdir()}
        results = json.loads((stages / "evaluate" / "results.json").read_text())
        rows = [
            ("bessemer --help, fastest of five", fastest("--help", folder=folder), "s"),
            ("the whole line", first, "s"),
            *((f"  {stage}", taken, "s") for stage, taken in sorted(seconds.items(), key=lambda item: -item[1])),
            ("again, nothing changed", again, "s"),
            *((f"bits per byte, {model}", value, "") for model, value in results["bits_per_byte"].items()),
            *((f"bits per byte, {baseline}", value, "") for baseline, value in results["baselines"].items()),
        ]
    print()
    for label, value, unit in rows:
        print(f"{label:<40} {value:>9.3f} {unit}")
    ours, peer = results["bits_per_byte"]["pretrain"], results["baselines"]["witten_bell_5gram"]
    print(
        json.dumps(
            {
                "name": "quickstart_bits_per_byte",
                "unit": "bits per byte of held-out packages",
                "bessemer": round(ours, 4),
                "peer": round(peer, 4),
                "peer_name": "interpolated Witten-Bell byte 5-gram",
                "ratio": round(peer / ours, 3),
                "machine": host(),
            }
        )
    )


if __name__ == "__main__":
    main()
