"""Pairs of a sentence and a source, made from an index, that teach which sources bear a sentence out.

Of each passage a plain sentence is taken. As it stands, and in other words (`reworded`), its own passage bears it out. It does
not where the sentence was changed: another number, another name, a negation more or less, two words in each other's place, an
opposite (`CHANGES`); and another passage, the nearest that the index finds, does not either. Statements that were written by
hand are beside them (`entailment_statements.json`).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bessemer.core.hashing import hash_value
from bessemer.retrieval.chunks import sentences
from bessemer.retrieval.index import OpenIndex
from bessemer.retrieval.store import Passage

_WRITTEN = Path(__file__).with_name("entailment_statements.json")
#: Characters of a sentence, and of a passage at most: a head reads few tokens of a long one's states.
_SHORTEST, _LONGEST, _LONGEST_PASSAGE = 25, 200, 700
_PLAIN = re.compile(r"[A-Z][^\n\[\]<>|`]*[.]")
#: Words with much the same meaning, in either direction.
_SAME = (
    *(("return", "give back"), ("returns", "gives back"), ("create", "make"), ("creates", "makes"), ("remove", "delete")),
    *(("removes", "deletes"), ("show", "display"), ("begin", "start"), ("begins", "starts"), ("end", "finish")),
    *(("ends", "finishes"), ("must", "has to"), ("may", "can"), ("several", "some"), ("large", "big"), ("obtain", "get")),
    *(("use", "employ"), ("uses", "employs"), ("current", "present"), ("change", "modify"), ("changes", "modifies")),
    *(("call", "invoke"), ("called", "invoked"), ("find", "locate"), ("contains", "holds"), ("contain", "hold")),
    *(("replaced", "substituted"), ("given", "specified"), ("omitted", "left out"), ("error", "mistake"), ("new", "fresh")),
    *(("raises", "throws"), ("raise", "throw"), ("sequence", "series"), ("directory", "folder"), ("whether", "if")),
    *(("all", "every one of the"), ("string", "text"), ("number", "count"), ("only", "solely"), ("usually", "mostly")),
)
#: Words of opposite meaning, in either direction.
OPPOSITES = (
    *(("true", "false"), ("first", "last"), ("before", "after"), ("always", "never"), ("all", "none"), ("more", "less")),
    *(("left", "right"), ("open", "closed"), ("start", "end"), ("begin", "end"), ("read", "write"), ("reading", "writing")),
    *(("add", "remove"), ("adds", "removes"), ("added", "removed"), ("insert", "delete"), ("encode", "decode")),
    *(("greater", "smaller"), ("larger", "smaller"), ("largest", "smallest"), ("longest", "shortest"), ("minimum", "maximum")),
    *(("with", "without"), ("empty", "full"), ("enable", "disable"), ("enabled", "disabled"), ("same", "different")),
    *(("equal", "unequal"), ("up", "down"), ("upper", "lower"), ("ascending", "descending"), ("above", "below")),
    *(("parent", "child"), ("source", "destination"), ("input", "output"), ("send", "receive"), ("client", "server")),
    *(("at least", "at most"), ("both", "neither"), ("valid", "invalid"), ("public", "private"), ("success", "failure")),
    *(("create", "delete"), ("accept", "reject"), ("allow", "forbid"), ("local", "remote"), ("old", "new"), ("only", "also")),
    *(("lock", "unlock"), ("increase", "decrease"), ("positive", "negative"), ("forward", "backward"), ("early", "late")),
)
_MODAL = re.compile(r"\b(is|are|was|were|can|may|must|should|will|does|do|has|have)\b(?! not\b)(?!n't)", re.IGNORECASE)
_VERB = re.compile(r"^([A-Z][a-z]+)\b")
_DENIED = re.compile(r"\b(is|are|was|were|can|may|must|should|will|does|do|has|have) not\b|\bcannot\b")
_WORDS = re.compile(r"\b[A-Za-z_][\w.]*\w\b")
_NUMBERS = re.compile(r"\b\d+\b")
SPELLED = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


@dataclass(frozen=True)
class Pair:
    """A sentence and a source. kind: how it was made."""

    sentence: str
    source: str
    supported: bool
    kind: str


def make_pairs(index: OpenIndex, count: int, seed: int = 0) -> Iterator[tuple[str, Pair]]:
    """Pairs of at most `count` passages of an index, drawn by the seed, each with its document."""
    passages = [one for one in index.store.passages() if len(one.text) <= _LONGEST_PASSAGE]
    drawn = sorted(passages, key=lambda one: hash_value([seed, one.id]))
    names = [name for one in drawn[:2000] if (name := _name(one))]
    made = 0
    for passage in drawn:
        found = [text for span in sentences(passage.text) if (text := plain_sentence(passage.text[span.start : span.end]))]
        if not found:
            continue
        draw = random.Random(f"{seed} {passage.id}")
        sentence, source = draw.choice(found), passage.shown
        yield passage.document, Pair(sentence, source, True, "as it stands")
        yield passage.document, Pair(reworded(sentence, passage, draw), source, True, "in other words")
        yield passage.document, Pair(reworded(sentence, passage, draw), source, True, "in other words")
        changes = [(kind, text) for kind, change in CHANGES.items() if (text := change(sentence, passage, names, draw))]
        draw.shuffle(changes)
        for kind, text in changes[:2]:
            # the rewording says nothing about which it is
            shown = reworded(text, passage, draw) if draw.random() < 0.6 else text
            yield passage.document, Pair(shown, source, False, kind)
        vector_D = index.embedder.embed([sentence], "query")[0] if index.embedder else None
        near = index.store.by_meaning(vector_D, 6) if vector_D is not None else index.store.by_words(sentence, 6)
        others = [one.passage for one in near if one.passage.document != passage.document and sentence not in one.passage.text]
        if others:
            text = reworded(sentence, passage, draw) if draw.random() < 0.6 else sentence
            yield passage.document, Pair(text, draw.choice(others).shown, False, "another passage")
        made += 1
        if made == count:
            return


def written_pairs(file: Path = _WRITTEN) -> list[Pair]:
    """Statements that were written by hand, with their passages."""
    passages = json.loads(file.read_text(encoding="utf-8"))["pairs"]
    return [
        Pair(one["text"], each["passage"], one["supported"], one.get("kind", ""))
        for each in passages
        for one in each["statements"]
    ]


def plain_sentence(sentence: str) -> str | None:
    """A sentence on one line where it can stand alone."""
    line = " ".join(sentence.split())
    return line if _PLAIN.fullmatch(line) and _SHORTEST <= len(line) <= _LONGEST and line.count(" ") >= 3 else None


def reworded(sentence: str, passage: Passage, draw: random.Random) -> str:
    """A sentence in other words, of the same meaning or of a part of it: words replaced by others of their meaning, numbers
    spelled, a clause or what is in parentheses left out, the subject named."""
    text = re.sub(r" \([^()]*\)", "", sentence) if draw.random() < 0.7 else sentence
    if draw.random() < 0.5:
        text = _first_clause(text)
    for one, other in draw.sample(_SAME, len(_SAME)):
        if draw.random() < 0.7:
            text = _exchanged(text, one, other) or _exchanged(text, other, one) or text
    if draw.random() < 0.5:
        text = re.sub(r"\b([1-9]|1[0-2])\b(?![.,:]\d)", lambda match: SPELLED[int(match[0]) - 1], text)
    name, verb = _name(passage), _VERB.match(text)
    if name and verb and verb[1].lower() in _IMPERATIVES and draw.random() < 0.6:
        said = _third_person(verb[1].lower()) + text[verb.end() :]
        forms = (
            f"{name} {said}",
            f"It {said}",
            f"{name.rpartition('.')[2]} {said}",
            f"Use {name}: {text[0].lower()}{text[1:]}",
        )
        text = draw.choice(forms)
    if draw.random() < 0.3:
        text = re.sub(r"\b(the|a|an) ", "", text)
    return text


#: Verbs with which documentation of functions begins.
_IMPERATIVES = frozenset(
    """return add apply build call change check close compare compile compute convert copy count create decode delete encode
    escape execute find format generate get insert iterate join list load make merge move open parse print read register remove
    rename replace run search send set show sort split start stop store test update wait wrap write give display
    """.split()  # noqa: SIM905
)


def _third_person(verb: str) -> str:
    return verb + ("es" if verb.endswith(("s", "h", "x")) else "s")


def _first_clause(text: str) -> str:
    """A sentence without what follows its last comma or semicolon, if enough is left."""
    start, mark, _ = text.rpartition("; " if "; " in text else ", ")
    return f"{start}." if mark and len(start) >= _SHORTEST else text


def _exchanged(text: str, one: str, other: str) -> str | None:
    """A text with one word, at its first place, replaced by another in its case; None without it."""
    match = re.search(rf"\b{one}\b", text, re.IGNORECASE)
    if match is None:
        return None
    new = other.capitalize() if match[0][0].isupper() else other
    return text[: match.start()] + new + text[match.end() :]


def _name(passage: Passage) -> str:
    """The name that a passage's title begins with, without its kind and parameters; empty for a title in words."""
    title = re.sub(r"^(class|module|def) ", "", passage.title.partition("(")[0]).strip()
    return title if title and " " not in title else ""


# ------------------------------------------------------------------------------------------- changes of what is said


def _other_number(sentence: str, passage: Passage, names: Sequence[str], draw: random.Random) -> str | None:
    """With another number; None without one."""
    places = [*_NUMBERS.finditer(sentence), *re.finditer(rf"\b({'|'.join(SPELLED)})\b", sentence)]
    if not places:
        return None
    match = draw.choice(places)
    if match[0].isdigit():
        value = int(match[0])
        new = str(draw.choice([one for one in (value + 1, value * 2 + 1, value * 10, max(0, value - 2)) if one != value]))
    else:
        new = draw.choice([one for one in SPELLED if one != match[0]])
    return sentence[: match.start()] + new + sentence[match.end() :]


def _other_name(sentence: str, passage: Passage, names: Sequence[str], draw: random.Random) -> str | None:
    """With a name of another passage, as the subject or in place of a name of its own."""
    if not names or not _name(passage):
        return None
    other = draw.choice(names)
    if other.rpartition(".")[2] == _name(passage).rpartition(".")[2]:
        return None
    places = [match for match in _WORDS.finditer(sentence) if "." in match[0] or "_" in match[0]]
    if places:
        match = draw.choice(places)
        return sentence[: match.start()] + other + sentence[match.end() :]
    verb = _VERB.match(sentence)
    if verb is None or verb[1].lower() not in _IMPERATIVES:
        return None
    said = _third_person(verb[1].lower()) + sentence[verb.end() :]
    return draw.choice(
        (f"{other} {said}", f"{other.rpartition('.')[2]} {said}", f"Use {other}: {sentence[0].lower()}{sentence[1:]}")
    )


def _denied(sentence: str, passage: Passage, names: Sequence[str], draw: random.Random) -> str | None:
    """With a negation more, or less."""
    if match := _DENIED.search(sentence):
        return sentence[: match.start()] + (match[1] or "can") + sentence[match.end() :]
    if match := _MODAL.search(sentence):
        return f"{sentence[: match.end()]} {draw.choice(('not', 'never', 'not'))}{sentence[match.end() :]}"
    verb = _VERB.match(sentence)
    if verb is None or verb[1].lower() not in _IMPERATIVES:
        return None
    return f"{draw.choice(('Does not', 'Do not', 'It does not', 'Never'))} {verb[1].lower()}{sentence[verb.end() :]}"


def _opposite(sentence: str, passage: Passage, names: Sequence[str], draw: random.Random) -> str | None:
    """With a word of opposite meaning."""
    for one, other in draw.sample(OPPOSITES, len(OPPOSITES)):
        if text := _exchanged(sentence, one, other) or _exchanged(sentence, other, one):
            return text
    return None


def _swapped(sentence: str, passage: Passage, names: Sequence[str], draw: random.Random) -> str | None:
    """With two words around a preposition or a verb in each other's place: from A to B."""
    form = r"\b(\w{3,}) (from|to|by|before|after|than|with|into|of|for|instead of) ((?:the |a |an )?)(\w{3,})\b"
    places = [match for match in re.finditer(form, sentence) if match[1].lower() != match[4].lower()]
    if not places:
        return None
    match = draw.choice(places)
    return f"{sentence[: match.start()]}{match[4]} {match[2]} {match[3]}{match[1]}{sentence[match.end() :]}"


def _other_word(sentence: str, passage: Passage, names: Sequence[str], draw: random.Random) -> str | None:
    """With a word of the passage, which the sentence has not, in place of one of its own."""
    own = {word.lower() for word in _WORDS.findall(sentence)}
    others = [word for word in _WORDS.findall(passage.text) if len(word) > 4 and word.lower() not in own and word.islower()]
    places = [match for match in _WORDS.finditer(sentence) if len(match[0]) > 4 and match[0].islower()]
    if not others or not places:
        return None
    match = draw.choice(places)
    return sentence[: match.start()] + draw.choice(others) + sentence[match.end() :]


CHANGES: dict[str, Callable[[str, Passage, Sequence[str], random.Random], str | None]] = {
    "number": _other_number,
    "name": _other_name,
    "negation": _denied,
    "opposite": _opposite,
    "swapped": _swapped,
    "word": _other_word,
}
