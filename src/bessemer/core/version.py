"""The version of a checkout, by git's tags. An installed package has its own in its metadata: `bessemer.__version__`.

A release is a tag `v1.2.3`. What comes after it is a version before the next one: `1.2.4.dev5+g0123abc`, five commits later.
A build of an sdist, which holds neither git nor tags, finds the version in its own `PKG-INFO`; an archive that a code host
makes of a tag, in `.git_archival.txt`, into which git writes it. Where there is no tag, the changelog's newest release counts.

The build loads this file by itself (`[tool.hatch.version]` in pyproject.toml and kernels/pyproject.toml): it imports nothing of
the package.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[3]
#: `git describe --long`: the tag, the number of commits behind it, the commit.
_DESCRIBED = re.compile(r"v(\d[\w.]*?)-(\d+)-g([0-9a-f]+)")
_HEADING = re.compile(r"^## (\d[\w.]*)", re.MULTILINE)


def of_checkout(root: Path = _ROOT) -> str:
    """The version of the sources in a folder: a checkout, an archive of one, or an unpacked sdist."""
    packed = _read(root / "PKG-INFO")
    if packed and (stated := re.search(r"^Version: (\S+)", packed, re.MULTILINE)):
        return stated[1]
    if (root / ".git").exists():
        if described := _DESCRIBED.fullmatch(_git(root, "describe", "--tags", "--long", "--match", "v[0-9]*")):
            tag, commits, commit = described.groups()
            return tag if commits == "0" else f"{_next(tag)}.dev{commits}+g{commit}"
        commit = _git(root, "rev-parse", "--short=8", "HEAD")
        return f"{_next(_newest(root))}.dev0" + (f"+g{commit}" if commit else "")
    # "v0.2.0" or "v0.2.0-3-gabc" in an archive; "$Format:…$" where git did not write it
    archived = re.search(r"^describe: v(\d[\w.]*?)(?:-(\d+)-g([0-9a-f]+))?$", _read(root / ".git_archival.txt"), re.MULTILINE)
    if archived:
        return f"{_next(archived[1])}.dev{archived[2]}+g{archived[3]}" if archived[2] else archived[1]
    return f"{_next(_newest(root))}.dev0"


def _next(version: str) -> str:
    """The version with its last number one higher: 0.2.0 → 0.2.1, 0.3.0rc1 → 0.3.0rc2."""
    return re.sub(r"\d+$", lambda number: str(int(number[0]) + 1), version)


def _newest(root: Path) -> str:
    """The newest release that the changelog describes."""
    heading = _HEADING.search(_read(root / "CHANGELOG.md"))
    return heading[1] if heading else "0.0.0"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _git(root: Path, *arguments: str) -> str:
    """What git says; nothing where there is no git, or where it refuses another user's folder."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


if __name__ == "__main__":
    print(of_checkout())
