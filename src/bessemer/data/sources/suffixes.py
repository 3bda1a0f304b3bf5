"""What a file's name says: its compression, and which source reads what is in it. Needs no package of the extra `data`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
#: One suffix for a tar and its compression.
_JOINED = {".tgz": ".gz", ".tbz2": ".bz2", ".txz": ".xz"}

#: Suffix → the source that reads such files whatever is in them.
READ_BY = {
    **dict.fromkeys((".txt", ".md", ".jsonl"), "files"),
    **dict.fromkeys((".csv", ".tsv", ".parquet", ".pq", ".ndjson"), "tables"),
    **dict.fromkeys((".html", ".htm", ".xhtml"), "html"),
    **dict.fromkeys((".warc", ".wet"), "warc"),
    **dict.fromkeys((".mbox", ".mbx"), "mbox"),
    **dict.fromkeys((".py", ".ipynb", ".c", ".cpp", ".h", ".java", ".js", ".ts", ".go", ".rs"), "code"),
    ".epub": "epub",
    ".pdf": "pdf",
    ".tex": "latex",
    ".xml": "mediawiki",
    ".rst": "docs",
}
#: Suffix → what makes something of such files that a source reads.
CONVERTED_BY = {
    **dict.fromkeys((".docx", ".odt", ".rtf"), "pandoc FILE -t plain --wrap none -o FILE.txt"),
    **dict.fromkeys((".doc", ".ppt", ".pptx"), "soffice --convert-to pdf FILE, for {source: pdf}"),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save the sheet as CSV, for {source: tables}"),
    ".json": "jq -c '.[]' FILE > FILE.jsonl, where it is a list of objects",
    ".7z": "unpack it",
}


def compression_of(name: str) -> str:
    """The compression that a file's name states, `` for none."""
    lowered = name.lower()
    return next((suffix for suffix in COMPRESSIONS if lowered.endswith(suffix)), _JOINED.get(lowered[lowered.rfind(".") :], ""))


def uncompressed_name(name: str) -> str:
    """A name without its compression: `a.txt.gz` is `a.txt`, `a.tgz` is `a.tar`."""
    stem, dot, suffix = name.rpartition(".")
    if dot + suffix.lower() in COMPRESSIONS:
        return stem
    return f"{stem}.tar" if dot + suffix.lower() in _JOINED else name


def suffix_of(name: str) -> str:
    """The suffix of a file without that of a compression, in small letters."""
    return PurePosixPath(uncompressed_name(name)).suffix.lower()


def advice(name: str) -> str:
    """How a file is read that a source does not read, as the end of a message; empty where nothing is known of its kind."""
    suffix = suffix_of(name)
    if suffix in READ_BY:
        return f"; {{source: {READ_BY[suffix]}}} reads {suffix}"
    return f"; to convert {suffix}: {CONVERTED_BY[suffix]}" if suffix in CONVERTED_BY else ""


def counted_kinds(names: Iterable[str]) -> str:
    """How many files there are of each kind that could be read: `12 .pdf, 3 .docx; {source: pdf} reads .pdf; …`."""
    kinds = Counter(suffix for name in names if (suffix := suffix_of(name)) in READ_BY or suffix in CONVERTED_BY)
    shown = sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0]))
    return ", ".join(f"{count:,} {suffix}" for suffix, count in shown) + "".join(advice(f"a{suffix}") for suffix, _ in shown)
