"""The rules of Gopher, C4 and FineWeb against datatrove's filters: speed, and rule by rule whether the verdicts are equal.

Speed: CPU-seconds of one thread on all texts, from strings to kept or not. Each of datatrove's four filters sees every text,
as ours do; where it drops a text at its first broken rule, it saves the others, and ours compute them all. The second figure
is the usual pipeline, in which datatrove's later filters do not see what the earlier ones dropped. Loading and compiling are
done before, and stated apart.

Verdicts: each rule on its own, the others switched off. datatrove's words and sentences are kept per text here, so that its
forty filters take minutes and not hours; nothing else about it is changed.
"""

from __future__ import annotations

import functools
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import recording
from data_common import alternated, beside, measured, read_texts, speed, texts_by_kind, write_texts

MEGABYTES = 6.0
ROWS = 1024  # of a batch, as the data engine has it
EXAMPLES = 2
#: Of the table: what was done, and its key.
SPEEDS = {
    "each filter on every text": "every_text",
    "as a pipeline, where datatrove's later filters skip what was dropped": "pipeline",
}


# --- ours ---------------------------------------------------------------------------------------------------------


def ours(path: str) -> dict[str, float]:
    """CPU-seconds of the filters, warm, and of their first call."""
    from bessemer.data.text.texts import Texts

    texts = read_texts(path)
    start = time.process_time()
    _our_verdicts(Texts.of(["Warm.", "", "- a\n- b…\n\n- a\n- b…"]))
    first = time.process_time() - start
    start = time.process_time()
    for row in range(0, len(texts), ROWS):
        _our_verdicts(Texts.of(texts[row : row + ROWS]))
    return {"seconds": time.process_time() - start, "first": first}


def _our_verdicts(texts: Any) -> dict[str, list[str | None]]:
    """Of each filter, why it drops each text."""
    from bessemer.data.edits.line_removal import c4_lines
    from bessemer.data.edits.registry import C4Lines
    from bessemer.data.filters.registry import preset
    from bessemer.data.filters.rules import c4, fineweb, gopher_quality, gopher_repetition
    from bessemer.data.plugins import Languages
    from bessemer.data.text.texts import Texts
    from bessemer.data.thresholds import rejection_reasons

    edited, _ = c4_lines(texts, C4Lines(every_script=True))  # as the peer, which knows no scripts
    return {
        "gopher repetition": rejection_reasons(gopher_repetition(texts), preset("gopher_repetition"), Languages()),
        "gopher quality": rejection_reasons(gopher_quality(texts), preset("gopher_quality"), Languages()),
        "c4": rejection_reasons(c4(Texts.from_arrow(edited)), preset("c4"), Languages()),
        "fineweb": rejection_reasons(fineweb(texts), preset("fineweb"), Languages()),
    }


def our_rules(path: str) -> dict[str, list[bool]]:
    """Of each rule, whether it keeps each text."""
    from bessemer.data.edits.line_removal import c4_lines, c4_terminal_lines
    from bessemer.data.edits.registry import C4Lines
    from bessemer.data.filters.registry import preset
    from bessemer.data.filters.rules import c4, fineweb, gopher_quality, gopher_repetition
    from bessemer.data.text.texts import Texts

    texts = Texts.of(read_texts(path))
    scores = (
        gopher_repetition(texts)
        | gopher_quality(texts)
        | fineweb(texts)
        | c4(Texts.from_arrow(c4_lines(texts, C4Lines(every_script=True))[0]))
    )
    kept = {}
    for rule, (lowest, highest) in (preset("gopher") | preset("fineweb") | preset("c4")).items():
        values = scores[rule].to_numpy()
        kept[rule] = (values >= (lowest if lowest is not None else values)) & (
            values <= (highest if highest is not None else values)
        )
    kept["gopher_hashes_per_word and gopher_ellipses_per_word"] = kept.pop("gopher_hashes_per_word") & kept.pop(
        "gopher_ellipses_per_word"
    )
    strict = c4(Texts.from_arrow(c4_terminal_lines(texts, C4Lines(every_script=True))[0]))
    kept["c4_sentences, after c4_terminal_lines"] = strict["c4_sentences"].to_numpy() >= 5
    return {rule: verdicts.tolist() for rule, verdicts in kept.items()}


def our_words(path: str) -> list[list[str]]:
    from bessemer.data.text.texts import Texts

    texts = Texts.of(read_texts(path))
    words, data = texts.words, texts.data.tobytes()
    spelt = [data[start:end].decode() for start, end in zip(words.starts, words.ends, strict=True)]
    return [spelt[first:last] for first, last in zip(words.of_text, words.of_text[1:], strict=False)]


def our_edits(path: str) -> list[str]:
    from bessemer.data.edits.line_removal import c4_lines
    from bessemer.data.edits.registry import C4Lines
    from bessemer.data.text.texts import Texts

    edited: list[str] = c4_lines(Texts.of(read_texts(path)), C4Lines(every_script=True))[0].to_pylist()
    return edited


# --- the peer's ---------------------------------------------------------------------------------------------------


def peer(path: str) -> dict[str, float]:
    """CPU-seconds of the four filters on every text, and of the pipeline of them."""
    from datatrove.data import Document

    texts, filters = read_texts(path), _peer_filters()
    start = time.process_time()
    for one in filters:
        one.filter(
            Document(text="A text that warms, and that is of many words, so that every one of the rules is asked. " * 9, id="")
        )
    first = time.process_time() - start
    seconds = dict.fromkeys(("seconds", "pipeline"), 0.0)
    for text in texts:
        is_kept = True
        for one in filters:
            document = Document(text=text, id="")
            start = time.process_time()
            verdict = _keeps(one, document)
            taken = time.process_time() - start
            seconds["seconds"] += taken
            if is_kept:
                seconds["pipeline"] += taken
            is_kept = is_kept and verdict
    return {**seconds, "first": first}


def _peer_filters() -> list[Any]:
    from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter

    return [
        GopherRepetitionFilter(),
        GopherQualityFilter(),
        C4QualityFilter(filter_no_terminal_punct=False),
        FineWebQualityFilter(),
    ]


def _keeps(one: Any, document: Any) -> bool:
    try:
        return one.filter(document) is True
    except ZeroDivisionError:  # of a text without words
        return False


def _single_rules() -> dict[str, Callable[[], Any]]:
    """datatrove's filter with one rule, by the name of ours."""
    from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter

    repetition = {"dup_line_frac": 0.3, "dup_para_frac": 0.3, "dup_line_char_frac": 0.2, "dup_para_char_frac": 0.2}
    no_repetition = {**dict.fromkeys(repetition), "top_n_grams": (), "dup_n_grams": ()}
    names = ("duplicate_lines", "duplicate_paragraphs", "duplicate_line_characters", "duplicate_paragraph_characters")
    rules: dict[str, Callable[[], Any]] = {}

    def add(ours: str, kind: Any, **options: Any) -> None:
        rules[ours] = functools.partial(kind, **options)

    for name, option in zip(names, repetition, strict=True):
        add(f"gopher_repetition_{name}", GopherRepetitionFilter, **{**no_repetition, option: repetition[option]})
    for n, limit in ((2, 0.2), (3, 0.18), (4, 0.16)):
        add(f"gopher_repetition_top_{n}_gram", GopherRepetitionFilter, **{**no_repetition, "top_n_grams": ((n, limit),)})
    for n, limit in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10)):
        add(f"gopher_repetition_duplicate_{n}_grams", GopherRepetitionFilter, **{**no_repetition, "dup_n_grams": ((n, limit),)})

    quality = {
        "gopher_words": {"min_doc_words": 50, "max_doc_words": 100_000},
        "gopher_mean_word_length": {"min_avg_word_length": 3, "max_avg_word_length": 10},
        "gopher_hashes_per_word and gopher_ellipses_per_word": {"max_symbol_word_ratio": 0.1},
        "gopher_bullet_lines": {"max_bullet_lines_ratio": 0.9},
        "gopher_ellipsis_lines": {"max_ellipsis_lines_ratio": 0.3},
        "gopher_words_with_letter": {"max_non_alpha_words_ratio": 0.8},
        "gopher_stop_words": {"min_stop_words": 2},
    }
    no_quality = {option: None for options in quality.values() for option in options}
    for name, options in quality.items():
        add(name, GopherQualityFilter, **{**no_quality, **options})

    never = {"line_punct_thr": 0, "short_line_thr": 2, "char_duplicates_ratio": 2, "new_line_ratio": float("inf")}
    fineweb = {"punctuated_lines": 0.12, "short_lines": 0.67, "duplicate_line_characters": 0.01, "newlines_per_word": 0.3}
    for (name, limit), option in zip(fineweb.items(), never, strict=True):
        add(f"fineweb_{name}", FineWebQualityFilter, **{**never, option: limit})

    no_c4 = {"filter_lorem_ipsum": False, "filter_curly_bracket": False, "min_num_sentences": -1}
    c4 = {"c4_lorem_ipsum": {"filter_lorem_ipsum": True}, "c4_curly_brackets": {"filter_curly_bracket": True}}
    for name, options in c4.items():
        add(name, C4QualityFilter, filter_no_terminal_punct=False, **{**no_c4, **options})
    add("c4_sentences", C4QualityFilter, filter_no_terminal_punct=False, **{**no_c4, "min_num_sentences": 5})
    add("c4_sentences, after c4_terminal_lines", C4QualityFilter, **{**no_c4, "min_num_sentences": 5})
    return rules


def peer_rules(path: str) -> dict[str, list[bool]]:
    """Of each rule, whether it keeps each text."""
    from datatrove.data import Document

    _keep_words_of_the_last_texts()
    texts = read_texts(path)
    filters = {rule: make() for rule, make in _single_rules().items()}
    kept: dict[str, list[bool]] = {rule: [] for rule in filters}
    for text in texts:
        for rule, one in filters.items():
            kept[rule].append(_keeps(one, Document(text=text, id="")))
    return kept


def _keep_words_of_the_last_texts() -> None:
    from datatrove.pipeline.filters import c4_filters, fineweb_quality_filter, gopher_quality_filter, gopher_repetition_filter
    from datatrove.utils.text import split_into_sentences, split_into_words

    words = functools.lru_cache(4)(split_into_words)
    for module in (gopher_quality_filter, gopher_repetition_filter, fineweb_quality_filter):
        module.split_into_words = words
    c4_filters.split_into_sentences = functools.lru_cache(100_000)(split_into_sentences)


def peer_words(path: str) -> list[list[str]]:
    from datatrove.utils.text import split_into_words

    return [split_into_words(text) for text in read_texts(path)]


def peer_edits(path: str) -> list[str]:
    """The texts after C4's rules about lines."""
    from datatrove.data import Document
    from datatrove.pipeline.filters import C4QualityFilter

    one = C4QualityFilter(
        filter_no_terminal_punct=False, filter_lorem_ipsum=False, filter_curly_bracket=False, min_num_sentences=-1
    )
    edited = []
    for text in read_texts(path):
        document = Document(text=text, id="")
        one.filter(document)
        edited.append(document.text)
    return edited


# --- the comparison -----------------------------------------------------------------------------------------------


def main() -> Path:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        kinds = texts_by_kind(MEGABYTES)
        texts = [text for group in kinds.values() for text in group]
        mb = write_texts(work / "texts.json", texts)
        by_kind = {kind: len(group) for kind, group in kinds.items()}
        print(f"{len(texts):,} texts, {mb:.1f} MB:", by_kind, flush=True)
        compiled = measured(ours, work / "texts.json", NUMBA_CACHE_DIR=str(work / "cache"))["first"]
        our, their = alternated(
            lambda: measured(ours, work / "texts.json", NUMBA_CACHE_DIR=str(work / "cache")),
            lambda: measured(peer, work / "texts.json"),
        )
        figures = {
            "texts": len(texts),
            "texts_by_kind": by_kind,
            "megabytes": mb,
            "first_call": {"compiling": compiled, "bessemer": our["first"]["median"], "datatrove": their["first"]["median"]},
            **{
                name: beside(speed(mb, our["seconds"]), speed(mb, their[seconds]), "datatrove")
                for name, seconds in (("every_text", "seconds"), ("pipeline", "pipeline"))
            },
        }
        loading = figures["first_call"]
        print(
            f"first call: {compiled:.1f} s with compiling, {loading['bessemer']:.2f} s after that; "
            f"datatrove {loading['datatrove']:.1f} s"
        )
        print(f"{'':<46} {'bessemer':>10} {'datatrove':>10} {'ratio':>8}   MB per CPU-second")
        for name, key in SPEEDS.items():
            row = figures[key]
            ours_mb, peer_mb = row["bessemer"]["median"], row["datatrove"]["median"]
            print(f"{name:<46} {ours_mb:>10.2f} {peer_mb:>10.3f} {row['ratio']:>7.1f}x", flush=True)
        figures["equal"] = compare(work / "texts.json", texts)
    return recording.save("data_filters", figures, tables=tables(figures), peers=("datatrove", "spacy"))


def tables(figures: dict[str, Any]) -> dict[str, Any]:
    rows = [
        (name, figures[key]["bessemer"]["median"], figures[key]["datatrove"]["median"], figures[key]["ratio"])
        for name, key in SPEEDS.items()
    ]
    columns = [("All four filters, MB per CPU-second", ""), ("Bessemer", ".1f"), ("datatrove", ".2f"), ("", ".0f~ ×")]
    return {"speed": recording.table(columns, rows)}


def compare(path: Path, texts: list[str]) -> dict[str, Any]:
    """Print, rule by rule, how many verdicts are equal, and of what kind those are that are not; the shares that are equal."""
    mine, theirs = measured(our_rules, path), measured(peer_rules, path)
    my_words, their_words = measured(our_words, path), measured(peer_words, path)
    same_words = sum(one == other for one, other in zip(my_words, their_words, strict=True))
    print(f"\ntexts cut into the same words: {same_words:,} of {len(texts):,} ({same_words / len(texts):.2%})")
    for (here, there), number in _cut_otherwise(my_words, their_words).most_common(10):
        print(f"{number:>6}  {here} here, {there} there")
    my_edits, their_edits = measured(our_edits, path), measured(peer_edits, path)
    same = [_lines(one) == _lines(other) for one, other in zip(my_edits, their_edits, strict=True)]
    same_lines = sum(same) / len(same)
    equal: dict[str, float] = {}
    kinds: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], list[str]] = {}
    for index in [index for index, is_same in enumerate(same) if not is_same]:
        _note(kinds, examples, "c4_lines", "lines kept differ", texts[index])
    assert mine.keys() == theirs.keys(), mine.keys() ^ theirs.keys()
    print(f"\n{'rule':<56} {'dropped':>8} {'by both':>8} {'equal':>9}")
    for rule, verdicts in mine.items():
        pairs = list(zip(verdicts, theirs[rule], strict=True))
        equal[rule] = sum(one == other for one, other in pairs) / len(pairs)
        dropped, both = sum(not one for one, _ in pairs), sum(not one and not other for one, other in pairs)
        print(f"{rule:<56} {dropped:>8,} {both:>8,} {equal[rule]:>9.3%}")
        for index, (one, other) in enumerate(pairs):
            if one != other:
                why = "".join(_explain(rule, texts[index], my_words[index], their_words[index]))
                _note(kinds, examples, rule, f"{why}; {'kept' if one else 'dropped'} here alone", texts[index])
    print(f"{'c4_lines: the same lines kept':<56} {'':>8} {'':>8} {same_lines:>9.3%}")
    print("\nwhere verdicts differ, and why:" if kinds else "\nno verdict differs")
    for (rule, why), number in sorted(kinds.items(), key=lambda item: -item[1]):
        print(f"{number:>6}  {rule}: {why}")
        for example in examples[rule, why]:
            print(f"          {example}")
    return {
        "words": same_words / len(texts),
        "lines": same_lines,
        "verdicts": min(equal.values()),
        "rules": len(equal),
        "by_rule": equal,
    }


def _lines(text: str) -> list[str]:
    """What an edit kept, whatever it did to white space."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def _note(kinds: Counter, examples: dict, rule: str, why: str, text: str) -> None:
    kinds[rule, why] += 1
    if len(examples.setdefault((rule, why), [])) < EXAMPLES:
        examples[rule, why].append(repr(text[:100]))


def _cut_otherwise(mine: list[list[str]], theirs: list[list[str]]) -> Counter[tuple[str, str]]:
    """What stands where two cuts of a text differ first, up to where they agree again."""
    kinds: Counter[tuple[str, str]] = Counter()
    for one, other in zip(mine, theirs, strict=True):
        if one != other:
            _, first, last, start, stop = next(
                code for code in SequenceMatcher(None, one, other, False).get_opcodes() if code[0] != "equal"
            )
            kinds[repr(one[first:last])[:70], repr(other[start:stop])[:70]] += 1
    return kinds


def _explain(rule: str, text: str, mine: list[str], theirs: list[str]) -> Iterator[str]:
    """The kind of a difference."""
    if mine != theirs:
        place = next((n for n, (one, other) in enumerate(zip(mine, theirs, strict=False)) if one != other), -1)
        yield f"words are cut otherwise ({mine[place : place + 3]} here, {theirs[place : place + 3]} there)"
    elif not theirs:
        yield "no words: datatrove divides by zero"
    elif "duplicate_lines" in rule and (text.startswith("\n") or text.endswith("\n")):
        yield "the nothing before a first or after a last line break is a line there"
    elif rule.startswith("c4_sentences") and re.search(r"\S\s{2,}\S", text):
        yield "white space of more than one character begins a sentence there"
    else:
        yield "other"
