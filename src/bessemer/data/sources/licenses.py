"""Licences as SPDX identifiers: from addresses, from `SPDX-License-Identifier` lines, from the texts themselves."""

from __future__ import annotations

import re

_CREATIVE_COMMONS = re.compile(r"creativecommons\.org/(?:licenses/([a-z-]+)/(\d\.\d)|publicdomain/(zero|mark)/(\d\.\d))", re.I)
_ADDRESSES = (
    (re.compile(r"opensource\.org/licen[sc]es?/mit\b", re.I), "MIT"),
    (re.compile(r"opensource\.org/licen[sc]es?/bsd-([23])-clause", re.I), r"BSD-\1-Clause"),
    (re.compile(r"apache\.org/licenses/license-2\.0", re.I), "Apache-2.0"),
    (re.compile(r"mozilla\.org/.*mpl/2\.0", re.I), "MPL-2.0"),
    (re.compile(r"gnu\.org/licenses/(?:old-licenses/)?(a|l|)gpl-(\d\.\d)", re.I), r"\1GPL-\2"),
    (re.compile(r"gnu\.org/(?:copyleft|licenses)/fdl", re.I), "GFDL"),
    (re.compile(r"arxiv\.org/licenses/nonexclusive-distrib/1\.0", re.I), "LicenseRef-arXiv-nonexclusive-1.0"),
)
#: What the address of every licence that is known holds.
LICENSE_HOSTS = (
    b"creativecommons.org/",
    b"opensource.org/",
    b"apache.org/",
    b"mozilla.org/",
    b"gnu.org/",
    b"arxiv.org/licenses",
)
_SPDX = re.compile(rb"SPDX-License-Identifier:[ \t]*([A-Za-z0-9.+()_ -]{2,100})")
#: The expression ends where a comment's closing sign begins.
_EXPRESSION = re.compile(r"\(?[A-Za-z0-9.+-]+\)?(?: (?:AND|OR|WITH) \(?[A-Za-z0-9.+-]+\)?)*")

#: Phrases that only one licence has, all of them needed; the first match counts, so narrower ones come first.
_TEXTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("AGPL-3.0", ("gnu affero general public license", "version 3")),
    ("LGPL-3.0", ("gnu lesser general public license", "version 3")),
    ("LGPL-2.1", ("gnu lesser general public license", "version 2.1")),
    ("GPL-3.0", ("gnu general public license", "version 3")),
    ("GPL-2.0", ("gnu general public license", "version 2")),
    ("MPL-2.0", ("mozilla public license", "2.0")),
    ("EPL-2.0", ("eclipse public license", "v 2.0")),
    ("Apache-2.0", ("apache license", "version 2.0")),
    ("BSL-1.0", ("boost software license", "version 1.0")),
    ("CC0-1.0", ("cc0 1.0 universal",)),
    ("CC-BY-NC-SA-4.0", ("attribution-noncommercial-sharealike 4.0",)),
    ("CC-BY-NC-4.0", ("attribution-noncommercial 4.0",)),
    ("CC-BY-SA-4.0", ("attribution-sharealike 4.0",)),
    ("CC-BY-4.0", ("attribution 4.0 international",)),
    ("PSF-2.0", ("python software foundation license",)),
    ("Unlicense", ("free and unencumbered software released into the public domain",)),
    ("Zlib", ("this software is provided 'as-is'", "altered source versions must be plainly marked")),
    ("MIT-0", ("permission is hereby granted, free of charge", "mit no attribution")),
    ("X11", ("permission is hereby granted, free of charge", "name of the x consortium")),
    ("MIT", ("permission is hereby granted, free of charge", "the above copyright notice and this permission notice")),
    ("BSD-4-Clause", ("redistribution and use in source and binary forms", "all advertising materials")),
    ("BSD-3-Clause", ("redistribution and use in source and binary forms", "endorse or promote")),
    ("BSD-2-Clause", ("redistribution and use in source and binary forms", "this list of conditions")),
    ("ISC", ("permission to use, copy, modify, and/or distribute this software for any purpose with or without fee",)),
    ("ISC", ("permission to use, copy, modify, and distribute this software for any purpose with or without fee",)),
    ("WTFPL", ("do what the fuck you want to public license",)),
)


def license_of_address(address: str) -> str | None:
    """The licence that a link leads to; None for an address that is not known to be a licence's."""
    if found := _CREATIVE_COMMONS.search(address):
        kind, version, public, public_version = found.groups()
        if kind:
            return f"CC-{kind.upper()}-{version}"
        return f"CC0-{public_version}" if public.lower() == "zero" else f"CC-PDM-{public_version}"
    for pattern, identifier in _ADDRESSES:
        if found := pattern.search(address):
            return found.expand(identifier).upper() if "GPL" in identifier else found.expand(identifier)
    return None


def stated_license(head: bytes) -> str | None:
    """The expression of a file's `SPDX-License-Identifier` line, looked for in its first bytes."""
    found = _SPDX.search(head)
    expression = _EXPRESSION.match(found[1].decode("ascii").strip()) if found else None
    return expression[0] if expression else None


def license_of_text(text: str) -> str | None:
    """The licence whose text this is, by phrases of it; None where it is none that is known."""
    plain = " ".join(text[:20_000].lower().replace("“", "'").replace("”", "'").replace('"', "'").split())
    return next((identifier for identifier, phrases in _TEXTS if all(phrase in plain for phrase in phrases)), None)
