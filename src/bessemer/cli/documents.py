"""`bessemer index`, `search` and `ask`: documents of one's own, found and answered from; `memory`: what was said before."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bessemer.cli.options import Device, Model, Runs

if TYPE_CHECKING:
    from bessemer.retrieval.access import AccessRule
    from bessemer.retrieval.answer import Answer
    from bessemer.retrieval.config import IndexConfig
    from bessemer.retrieval.index import OpenIndex
    from bessemer.retrieval.search import Hit

#: Files named by the end of `bessemer index` that could not be read.
_MOST_LOSSES = 20

#: How often a model is to put a true statement above a false one, below which its head is of no use.
_LEAST_TOLD_APART = 0.7

Index = Annotated[
    str,
    typer.Argument(
        metavar="INDEX", help="The folder of the index, as `bessemer index` made it, or its address: s3://bucket/name."
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option("--only", help="Only this document, or those that a pattern such as guide/* matches; may be repeated."),
]
Section = Annotated[
    int,
    typer.Option(
        metavar="CHARACTERS",
        help="Take the section in which a passage stands in place of it, where that has at most that many characters; of a "
        "longer one the passages around it. 0: passages alone.",
        min=0,
        max=100_000,
    ),
]
Rerank = Annotated[
    str | None,
    typer.Option(
        "--rerank",
        help="Order what was found by this model: a cross-encoder's folder, a language model (as MODEL), or URL#MODEL.",
    ),
]

Expand = Annotated[
    str | None,
    typer.Option(
        "--expand", metavar="MODEL", help="Search also for headings that this language model writes in answer to the question."
    ),
]


def index(
    documents: Annotated[str, typer.Argument(metavar="DOCS", help="A file, a folder, or a source such as python_docs.")],
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT", help="Folder of the index, or an address such as s3://bucket/name; an existing index is updated."
        ),
    ],
    also: Annotated[list[str] | None, typer.Option(help="More documents; may be repeated.")] = None,
    watch: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Look for changed files so often, and update the index, until Ctrl-C.", min=0.1),
    ] = None,
    embedder: Annotated[
        str | None,
        typer.Option(
            help="minilm (the default), a folder of an encoder or language model, URL#MODEL, or none (search by words only)."
        ),
    ] = None,
    passage: Annotated[int | None, typer.Option(help="Longest passage in characters (default 1000).", min=100)] = None,
    overlap: Annotated[
        int | None, typer.Option(help="Most characters that neighbouring passages share (default 120).", min=0)
    ] = None,
    access: Annotated[
        str | None,
        typer.Option(
            help="YAML file of which groups may see which documents, as hr/*: [hr]. It is kept for updates; none removes it."
        ),
    ] = None,
) -> None:
    """Index documents, or bring an index up to date: what is unchanged is kept, what is gone leaves it."""
    from bessemer.cli.named import option_of
    from bessemer.core.errors import ConfigError
    from bessemer.core.object_storage import ObjectPath, is_address
    from bessemer.core.progress import progress_for_terminal
    from bessemer.core.store import read_json
    from bessemer.retrieval.access import access_of, read_access
    from bessemer.retrieval.config import IndexConfig
    from bessemer.retrieval.index import INDEX
    from bessemer.retrieval.remote import cache_folder, remote_index

    given = {"embedder": embedder, "passage_characters": passage, "overlap_characters": overlap}
    changed = {name: value for name, value in given.items() if value is not None}
    places = [documents, *(also or [])]

    def settings_of(folder: Path) -> tuple[IndexConfig, Sequence[AccessRule]]:
        before = read_json(folder / INDEX, "index").get("config", {}) if (folder / INDEX).exists() else {}
        rules = access_of(folder) if access is None else () if access == "none" else read_access(Path(access))
        return IndexConfig.parse(before | changed, option_of("index")), rules

    if is_address(out):
        if watch is not None:
            raise ConfigError("--watch: of an index in a folder; run bessemer index again to upload a new version")
        address = ObjectPath.parse(out)
        with remote_index(address, cache_folder(), progress_for_terminal()) as folder:
            _update(places, folder, *settings_of(folder))
        print(f"{address}: uploaded", flush=True)
    elif watch is None:
        _update(places, Path(out), *settings_of(Path(out)))
    else:
        _watch(places, Path(out), *settings_of(Path(out)), watch)


def _update(given: list[str], out: Path, config: IndexConfig, rules: Sequence[AccessRule]) -> None:
    """Bring an index up to date, and print what happened."""
    from bessemer.core.progress import progress_for_terminal
    from bessemer.data.sources.source import Tally
    from bessemer.retrieval.access import with_access
    from bessemer.retrieval.documents import documents_of, other_kinds, remember_roots, sources_of
    from bessemer.retrieval.index import CACHE, build_index

    sources = [source for name in given for source in sources_of(name)]
    tally, progress = Tally(most_losses=_MOST_LOSSES), progress_for_terminal()
    documents = with_access(documents_of(sources, out / CACHE, tally, progress), rules, out)
    summary = build_index(documents, out, config, progress=progress)
    remember_roots(out, given)
    for loss in tally.losses:
        print(f"  left out: {loss}")
    if len(tally.losses) == _MOST_LOSSES:
        print("  … and perhaps more")
    for kinds in filter(None, map(other_kinds, given)):
        print(f"  not read: {kinds}")
    print(f"{out}: {summary}", flush=True)


def _watch(given: list[str], out: Path, config: IndexConfig, rules: Sequence[AccessRule], seconds: float) -> None:
    """Update an index whenever files change. A failed update is one line, and the watch goes on."""
    from bessemer.core.errors import BessemerError, ConfigError
    from bessemer.retrieval.documents import snapshot_of, wait_for_change

    if absent := [name for name in given if not Path(name).exists()]:
        raise ConfigError(f"--watch: {absent[0]} is no file or folder, and only those can be watched")
    try:
        before = snapshot_of(given)
        while True:
            try:
                _update(given, out, config, rules)
            except BessemerError as error:
                print(f"{error}; waiting for a change", flush=True)
            before = wait_for_change(lambda: snapshot_of(given), before, seconds)
    except KeyboardInterrupt:
        print(f"\nno longer watched; {out} stays as it is")


def search(
    place: Index,
    query: Annotated[str, typer.Argument(help="The text to search for.")],
    count: Annotated[int, typer.Option("--count", "-n", help="Number of passages.", min=1, max=100)] = 5,
    mode: Annotated[str, typer.Option(help="hybrid, words or meaning.")] = "hybrid",
    only: Only = None,
    neighbours: Annotated[int, typer.Option(help="Passages before and after each hit, shown with it.", min=0, max=20)] = 0,
    section: Section = 0,
    rerank: Rerank = None,
    expand: Expand = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Find passages, by words and by meaning, with why each is where it is."""
    from bessemer.core.config import nearest
    from bessemer.core.errors import ConfigError
    from bessemer.retrieval.search import search as find
    from bessemer.retrieval.store import Filter

    if mode not in (modes := ["hybrid", "words", "meaning"]):
        raise ConfigError(f"--mode {mode}: it is {', '.join(modes)}{nearest(mode, modes)}")
    if neighbours and section:
        raise ConfigError("--neighbours, --section: the one adds passages, the other takes whole sections; give one")
    opened = _opened(place, rerank, expand, runs)
    around = {"neighbours": neighbours, "section": section}
    hits = find(opened, query, count, mode=mode, where=Filter(only or ()), **around)  # type: ignore[arg-type]
    if as_json:
        print(json.dumps([_figures(hit) for hit in hits], ensure_ascii=False, indent=2))
        return
    for number, hit in enumerate(hits, start=1):
        print(f"[{number}] {_place(hit)}  {hit.explanation}\n{_indented(_with_header(hit))}\n")
    if not hits:
        print("nothing was found")


def ask(
    model: Model,
    place: Index,
    question: Annotated[str, typer.Argument(help="The question.")],
    count: Annotated[int, typer.Option("--count", "-n", help="Most sources; fewer where the context is short.", min=1)] = 5,
    only: Only = None,
    max_tokens: Annotated[int, typer.Option(help="At most this many tokens.", min=1)] = 256,
    least: Annotated[
        float | None,
        typer.Option(
            help="Refuse the question if no cosine, with --expand plus half of a heading's similarity, reaches this.",
            min=-1,
            max=2,
        ),
    ] = None,
    rerank: Rerank = None,
    expand: Expand = None,
    sources: Annotated[
        str, typer.Option(help="together, or each: a small model reads each source alone, and answers from the best.")
    ] = "together",
    section: Section = 0,
    check: Annotated[
        Path | None,
        typer.Option(
            metavar="HEAD",
            help="Mark sentences by this entailment head, as `bessemer entailment` made it, and its model; else by words.",
        ),
    ] = None,
    quote: Annotated[bool, typer.Option("--quote", help="Answer with a sentence of a source, word for word.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    device: Device = "auto",
    runs: Runs = Path("runs"),
) -> None:
    """Answer a question from an index, with the sources of each sentence. Sentences that these do not bear out are marked."""
    from bessemer.cli.named import find_served
    from bessemer.core.config import nearest
    from bessemer.core.errors import ConfigError
    from bessemer.inference.engine import Engine
    from bessemer.inference.sampling.params import SamplingParams
    from bessemer.retrieval.answer import NearestJudge
    from bessemer.retrieval.answer import ask as answer_from
    from bessemer.retrieval.store import Filter

    if sources not in (readings := ["together", "each"]):
        raise ConfigError(f"--sources {sources}: it is {', '.join(readings)}{nearest(sources, readings)}")
    opened = _opened(place, rerank, expand, runs)
    judge = None if least is None else NearestJudge(least)
    with ExitStack() as stack:
        engine = stack.enter_context(Engine(find_served(model, runs), device=device))
        entails = None
        if check is not None:
            from bessemer.retrieval.entailment import Entailment, load_head

            head = load_head(check)
            # asked in turn with the one that answers, which is the same where the name is
            asked = engine if head.model == model else stack.enter_context(Engine(find_served(head.model, runs), device=device))
            entails = Entailment(asked, head).probabilities
        params = SamplingParams(max_tokens=max_tokens, temperature=0)
        answer = answer_from(
            engine,
            opened,
            question,
            count=count,
            where=Filter(only or ()),
            judge=judge,
            params=params,
            reading=sources,  # type: ignore[arg-type]
            quote=quote,
            section=section,
            entails=entails,
        )
    if as_json:
        print(json.dumps(_answer_figures(answer), ensure_ascii=False, indent=2))
        return
    for statement in answer.statements:
        print(statement.text + ("" if statement.is_supported else "  (not in its sources)"))
    if not answer.is_held:
        print(answer.text)
        return
    print()
    for number in answer.cited or range(1, len(answer.sources) + 1):
        print(f"[{number}] {_place(answer.sources[number - 1])}")
    if not answer.cited:
        print("(the answer cites none of these)")


def questions(
    place: Index,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File of JSON lines to write.")],
    count: Annotated[int, typer.Option("--count", "-n", help="Most questions, each on another document.", min=1)] = 500,
    cited: Annotated[
        bool, typer.Option("--cited", help="Conversations with sources and a citing answer, to tune a model on (finetune).")
    ] = False,
    unanswered: Annotated[
        float, typer.Option(help="--cited: share of the questions whose passage is not among the sources.", min=0, max=1)
    ] = 0.25,
    longest: Annotated[int, typer.Option(help="--cited: most characters of a source; short ones save time.", min=100)] = 1000,
    most_sources: Annotated[
        int, typer.Option(help="--cited: most sources of a conversation; 1 for answers by ask --sources each.", min=1, max=8)
    ] = 4,
    negatives: Annotated[
        int | None,
        typer.Option(
            help="Rows to train an embedder on, with as many passages that do not answer the question.", min=0, max=32
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
) -> None:
    """Make questions from an index, with the passage that answers each: to measure a search, or to tune a model."""
    from bessemer.core.errors import ArtefactError, ConfigError
    from bessemer.retrieval.index import open_index
    from bessemer.retrieval.questions import as_questions, cited_conversations, contrastive_rows, make_questions
    from bessemer.retrieval.remote import local_index
    from bessemer.retrieval.specs import write_lines

    if out.exists():
        raise ArtefactError(f"{out}: is there already; name another file")
    if cited and negatives is not None:
        raise ConfigError("--cited, --negatives: the one makes conversations, the other rows for an embedder; give one")
    opened = open_index(local_index(place))
    if cited:
        rows = list(
            cited_conversations(opened, count, unanswered=unanswered, longest=longest, most_sources=most_sources, seed=seed)
        )
    elif negatives is not None:
        rows = list(contrastive_rows(opened, count, negatives, seed))
    else:
        rows = list(as_questions(make_questions(opened, count, seed)))
    write_lines(out, rows)
    print(f"{out}: {len(rows):,} {'conversations' if cited else 'questions'}")


def entailment(
    place: Index,
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File of the head to write, in JSON.")],
    passages: Annotated[int, typer.Option(help="Most passages of which pairs are made, about six of each.", min=10)] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    device: Device = "auto",
    runs: Runs = Path("runs"),
) -> None:
    """Train a head that says of answers which sentences their sources bear out, over a model's opinions, for `ask --check`."""
    from bessemer.cli.named import find_served
    from bessemer.core.errors import ArtefactError
    from bessemer.inference.engine import Engine
    from bessemer.retrieval.entailment import train_head
    from bessemer.retrieval.index import open_index
    from bessemer.retrieval.remote import local_index

    if out.exists():
        raise ArtefactError(f"{out}: is there already; name another file")
    with Engine(find_served(model, runs), device=device) as engine:
        head = train_head(open_index(local_index(place)), engine, model, passages=passages, seed=seed)
    head.save(out)
    print(f"{out}: fitted on {head.made['pairs']:,} pairs, calibrated on {head.made['calibrated_on']:,} written by hand")
    told_apart = head.made["told_apart"]
    print(f"{model} puts a true statement above a false one in {told_apart:.0%} of the written ones; half is chance")
    if told_apart < _LEAST_TOLD_APART:
        print(f"note: {model} does not tell them apart, so this head is of no use; take a larger model", file=sys.stderr)


def memory(
    place: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of a memory, as chat --memory has it.")],
    find: Annotated[str | None, typer.Option(metavar="QUERY", help="Show the turns that fit a query, the best first.")] = None,
    forget: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Delete the turns that hold this text, for good; * stands for all turns."),
    ] = None,
    conversation: Annotated[
        str | None, typer.Option(metavar="ID", help="Only turns of the conversation whose identity begins so.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
) -> None:
    """Show what is remembered of conversations, and delete of it."""
    from bessemer.core.errors import ArtefactError, ConfigError, RequestError
    from bessemer.retrieval.memory import ConversationMemory, RememberedTurn

    if find is not None and forget is not None:
        raise ConfigError("--find, --forget: the one shows turns, the other deletes them; give one")
    if forget is not None and not forget.strip():
        raise ConfigError("--forget: say a text that the turns hold, or * for all")
    if not place.is_dir():
        raise ArtefactError(f"{place}: no memory is here; bessemer chat MODEL --memory {place} makes one")
    remembered = ConversationMemory(place)

    def is_meant(turn: RememberedTurn) -> bool:
        wanted = forget in (None, "*") or str(forget).casefold() in turn.text.casefold()
        return wanted and (conversation is None or turn.conversation.startswith(conversation))

    if find is not None:
        for hit in remembered.recall(find, 10):
            print(f"{hit.passage.document[:8]}  {hit.passage.shown}\n")
        return
    turns = [turn for turn in remembered.turns() if is_meant(turn)]
    for turn in turns:
        print(f"{turn.conversation[:8]}  {turn.title}: {turn.text}")
    if forget is None:
        print(f"{place}: {len(turns):,} turns of {len({turn.conversation for turn in turns}):,} conversations")
        return
    if not turns:
        print("no turn is meant; nothing was deleted")
        return
    if not yes:
        try:
            if input(f"delete these {len(turns):,} turns for good? [y/N] ").strip().lower() not in ("y", "yes"):
                raise RequestError("nothing was deleted")
        except EOFError:
            raise RequestError("nothing was deleted; --yes deletes without asking") from None
    print(f"{remembered.forget(is_meant):,} turns deleted")


def _opened(place: str, rerank: str | None, expand: str | None, runs: Path) -> OpenIndex:
    """An index with the models that its searches ask."""
    from bessemer.cli.named import find_expander, find_reranker
    from bessemer.retrieval.index import open_index
    from bessemer.retrieval.remote import local_index

    reranker = None if rerank is None else find_reranker(rerank, runs)[1]
    return open_index(local_index(place), reranker=reranker, expander=None if expand is None else find_expander(expand, runs))


def _place(hit: Hit) -> str:
    passage = hit.passage
    above = " › ".join(part for part in (passage.title, passage.headings) if part)
    page = "" if passage.page is None else f", page {passage.page}"
    return f"{passage.document}{page}, bytes {passage.start:,} to {passage.end:,}" + (f": {above}" if above else "")


def _with_header(hit: Hit) -> str:
    return "\n".join(part for part in (hit.passage.table_header, hit.passage.text) if part)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _figures(hit: Hit) -> dict[str, object]:
    return {**hit.details, "text": hit.passage.text, "score": hit.score}


def _answer_figures(answer: Answer) -> dict[str, object]:
    return {
        "answer": answer.text,
        "is_held": answer.is_held,
        "statements": [
            {"text": one.text, "cited": list(one.cited), "support": one.support, "is_supported": one.is_supported}
            | ({} if one.entailment is None else {"entailment": one.entailment})
            for one in answer.statements
        ],
        "quotes": [{"text": one.text, "source": one.source, "start": one.start, "end": one.end} for one in answer.quotes],
        "sources": [_figures(hit) for hit in answer.sources],
    }
