"""Verdicts beside datatrove's on a few texts; on real ones by the thousand: `python benchmarks/data.py filters`."""

from __future__ import annotations

import pytest

from bessemer.data.edits.line_removal import c4_lines
from bessemer.data.edits.registry import C4Lines
from bessemer.data.filters.registry import preset
from bessemer.data.filters.rules import c4, fineweb, gopher_quality, gopher_repetition
from bessemer.data.plugins import Languages
from bessemer.data.text.texts import Texts
from bessemer.data.thresholds import rejection_reasons

filters = pytest.importorskip("datatrove.pipeline.filters", reason="beside datatrove")
Document = pytest.importorskip("datatrove.data", reason="beside datatrove").Document
pytestmark = pytest.mark.peer(name="datatrove")

PARAGRAPH = (
    "The furnace of the works has to be heated with care, and the masters that have seen it burn know well-tried ways to tell "
    "by the colour of the flame, e.g. from red to white, when the carbon of the raw iron is gone. It doesn't take long!\n"
)
PROSE = PARAGRAPH + "".join(
    f"Of vessel {n}, which holds {n}0 tonnes of iron, they tell another story to {n} men.\n" for n in range(9)
)
TEXTS = [
    PROSE,
    PARAGRAPH * 3,
    "\n".join(f"Home\nAbout us\nArticle {n}" for n in range(40)),
    PROSE.replace(" ", ""),
    PROSE.replace(".", "...").replace("\n", " …\n"),
    PROSE + "#" * 60,
    "\n".join(f"- item {n} of the list, to be had with ease" for n in range(30)),
    PROSE + 'function () { return "javascript"; } is a part of this line.',
    PROSE.replace("iron", "lorem ipsum"),
    "Please enable JavaScript to read this. " * 20,
    "1 2 3 4 5 6 7 8 9 10 the of " * 10,
    PROSE.upper(),
    "Too short.",
    PROSE.replace("\n", "\n\n") + PARAGRAPH,
    "Das ist ein deutscher Text über Eisen, in dem kein einziges englisches Wort vorkommt; nur dieser Satz. " * 7,
]


def test_verdicts_are_those_of_datatrove():
    texts = Texts.of(TEXTS)
    ours = {
        "GopherRepetitionFilter": rejection_reasons(gopher_repetition(texts), preset("gopher_repetition"), Languages()),
        "GopherQualityFilter": rejection_reasons(gopher_quality(texts), preset("gopher_quality"), Languages()),
        "FineWebQualityFilter": rejection_reasons(fineweb(texts), preset("fineweb"), Languages()),
        "C4QualityFilter": rejection_reasons(
            c4(Texts.from_arrow(c4_lines(texts, C4Lines(every_script=True))[0])), preset("c4"), Languages()
        ),
    }
    options = {"C4QualityFilter": {"filter_no_terminal_punct": False}}
    for name, reasons in ours.items():
        peer = getattr(filters, name)(**options.get(name, {}))
        theirs = [peer.filter(Document(text=text, id="")) is True for text in TEXTS]
        assert [reason is None for reason in reasons.to_pylist()] == theirs, name
        assert 0 < sum(theirs) < len(TEXTS), name
