"""Lock files and the list of what is installed (SBOM), from pyproject.toml: `make locks`, `make sbom`.

    python requirements/make.py locks              # requirements/EXTRA.txt: an extra's packages, their versions and hashes
    python requirements/make.py sbom PYTHON OUT    # CycloneDX: the packages of an environment, and what the wheel bundles

Locks need `pip-tools`, the list `cyclonedx-bom`. Locks are made from PyPI; a machine's own settings of pip (another index,
folders of wheels, constraints) are left aside, and no address of an index is written.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: The extras that have a lock. Others are made by name: `python requirements/make.py locks train`.
LOCKED = ("data", "serve", "all")
_HEADER = """\
# Made by `make locks` with Python {python} on {system} from the ranges in pyproject.toml.
#   pip install --require-hashes -r requirements/{extra}.txt && pip install --no-deps bessemer
"""
#: This package itself, with its checkout's folder, where an extra brings another of its extras, and pip-tools' remark on it.
_ITSELF = re.compile(
    r"^(?:# WARNING: pip install .*\n# Consider .*\n)?bessemer(?:\[.*?\])? @ file:.*\n(?: .*\n)*", re.MULTILINE
)
_LICENSE_FILES = ROOT / "src" / "bessemer" / "webapp" / "static"


def lock(extra: str) -> str:
    """The text of a lock file."""
    command = [sys.executable, "-m", "piptools", "compile", "--quiet", "--generate-hashes", "--strip-extras", "--allow-unsafe"]
    command += ["--no-header", "--no-emit-index-url", "--no-emit-find-links", "--no-emit-trusted-host", "--no-emit-options"]
    command += ["--annotation-style=line", "--upgrade", f"--extra={extra}", "--output-file=-", "pyproject.toml"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_") or name == "PIP_CERT"}
    environment["PIP_CONFIG_FILE"] = os.devnull
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    version, lines = ".".join(map(str, sys.version_info[:2])), done.stdout
    return _HEADER.format(python=version, system=f"{sys.platform} {os.uname().machine}", extra=extra) + _ITSELF.sub("", lines)


def sbom(python: str, out: Path) -> None:
    """Write the list of an environment's packages, each with its licence, and of the libraries that the wheel bundles."""
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "cyclonedx_py", "environment", "--output-reproducible", "--gather-license-texts", python]
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    content: dict[str, Any] = json.loads(done.stdout)
    content.setdefault("components", []).extend(bundled())
    out.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{out}: {len(content['components'])} components")


def bundled() -> list[dict[str, Any]]:
    """The libraries of the web app, as their licence files and headers name them."""
    (uplot,) = re.findall(r"uPlot \(v([\d.]+)\)", (_LICENSE_FILES / "uplot.js").read_text(encoding="utf-8"))
    found = [("uplot", uplot, "MIT")]
    for path in sorted((_LICENSE_FILES / "vendor").glob("*-license.txt")):
        text = path.read_text(encoding="utf-8")
        for name, version in re.findall(r"^== (\S+) (\d[\d.]*)$", text, re.MULTILINE):
            licence = {"highlight.js": "BSD-3-Clause", "entities": "BSD-2-Clause"}.get(name, "MIT")
            found.append((name, version, licence))
    (fonts,) = (version for name, version, _ in found if name == "katex")
    found.append(("katex-fonts", fonts, "OFL-1.1"))
    return [
        {
            "type": "library",
            "bom-ref": f"bundled-{name}",
            "name": name,
            "version": version,
            "licenses": [{"license": {"id": licence}}],
            **({} if name == "katex-fonts" else {"purl": f"pkg:npm/{name}@{version}"}),
        }
        for name, version, licence in found
    ]


def main() -> None:
    """Make what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("locks").add_argument("extras", nargs="*", default=LOCKED)
    of_environment = commands.add_parser("sbom")
    of_environment.add_argument("python")
    of_environment.add_argument("out", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "sbom":
        sbom(arguments.python, arguments.out)
        return
    for extra in arguments.extras:
        text = lock(extra)
        (ROOT / "requirements" / f"{extra}.txt").write_text(text, encoding="utf-8")
        print(f"requirements/{extra}.txt: {len(re.findall(r'^[a-z].*==', text, re.MULTILINE))} packages")


if __name__ == "__main__":
    main()
