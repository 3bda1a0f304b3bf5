"""The description for a package index, from README.md: an index shows it elsewhere, where a relative link leads nowhere.

Links to files of the repository become absolute where the repository's address is known: `Source` in `[project.urls]`, or the
variable BESSEMER_SOURCE, which the release's workflow sets. Else their words stay and the links go. Pictures likewise.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_PICTURE = re.compile(r"!\[([^\]]*)\]\((?!https?:)([^)]+)\)\n*")
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|`[^`]*`)*)\]\((?!https?:|#|mailto:)([^)]+)\)")
_MARK = re.compile(r"<!-- [^>]* -->\n?")


class CustomMetadataHook(MetadataHookInterface):
    """Fills `readme` in."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Called by the build with the table `[project]`."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        source = metadata.get("urls", {}).get("Source") or os.environ.get("BESSEMER_SOURCE")
        version = str(metadata.get("version", ""))
        reference = "HEAD" if not version or ".dev" in version else f"v{version}"
        metadata["readme"] = {"content-type": "text/markdown", "text": for_an_index(text, source, reference)}


def for_an_index(text: str, source: str | None, reference: str = "HEAD") -> str:
    """README without relative addresses. source: the repository's address; reference: a tag, a branch or a commit of it."""
    text = _MARK.sub(lambda mark: "\n" if mark[0].startswith("<!-- needs") and not mark[0].endswith("\n") else "", text)
    if source is None:
        return _LINK.sub(r"\1", _PICTURE.sub("", text))
    base = source.rstrip("/")
    text = _PICTURE.sub(lambda found: f"![{found[1]}]({base}/raw/{reference}/{found[2]})\n\n", text)
    return _LINK.sub(lambda found: f"[{found[1]}]({base}/blob/{reference}/{found[2]})", text)
