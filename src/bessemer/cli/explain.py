"""`bessemer explain`: scores and verdict of one document. `train-classifier` and `train-words`: scores learned from texts."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bessemer.cli.options import Runs, print_view

if TYPE_CHECKING:
    from bessemer.data.config import CleanConfig, SelectConfig
    from bessemer.data.corpus.reader import Sighting


_PAGES = (".html", ".htm", ".xhtml")
_OTHER_FILES = (".txt", ".md", ".rst", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".pdf", ".docx", ".warc", ".gz", ".py")
_ADDRESS = re.compile(r"https?://\S+", re.IGNORECASE)
#: A path, or a name with a suffix. Of ASCII alone: scripts without spaces write whole texts in one word.
_FILE_NAME = re.compile(r"[!-~]*[/\\][!-~]*|[!-~]*[!-.0-~]\.[A-Za-z][A-Za-z0-9]{0,6}")
_LONGEST_NAME = 255
#: Most tokens of a text that are shown.
_MOST_TOKENS = 600


def explain(
    thing: Annotated[
        str,
        typer.Argument(
            help="A text, a file (of a web page, its main text is taken), an address, - for standard input, or an id."
        ),
    ],
    run: Annotated[str | None, typer.Option(help="Ask this run's recipe; its documents may be named by their ids.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Ask this recipe: a shipped name or a .yaml file.")] = None,
    url: Annotated[str | None, typer.Option(help="The document's address, for filters that look at it.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Show the text in its tokens: a folder, a run, a file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    allow_code: Annotated[bool, typer.Option("--allow-code", help="Let the recipe run code of its own.")] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Say what every edit and filter thinks of one document, and whether it would be kept.

    Without --run or --recipe all that there is are asked, with the usual limits. An address (https://…) is judged as an
    address: what it leads to is not fetched.
    """
    from bessemer.core.errors import RequestError
    from bessemer.data.stages.explain import explain as ask
    from bessemer.data.stages.explain import explain_address, explain_with
    from bessemer.pipeline.stages import open_language_model
    from bessemer.views.explanation import show_explanation, show_history

    if run is not None and recipe is not None:
        raise RequestError("--run names a recipe already: give one of --run and --recipe")
    sightings = _history(thing, run, runs)
    settings = _settings(run, recipe, runs, allow_code)
    if _ADDRESS.fullmatch(thing):
        if settings is not None or url is not None:
            raise RequestError(f"{thing}: this is an address; give the page's text, or its file, and --url {thing}")
        explanation = explain_address(thing)
    else:
        text, url = (sightings[0].row["text"], url or sightings[0].row["url"]) if sightings else (_read(thing), url)
        if settings is None:
            explanation = ask(text, url=url)
        else:
            explanation = explain_with(text, *settings, url=url, open_model=open_language_model)
    pieces = _pieces(explanation.text, tokenizer or run, runs, required=tokenizer is not None)
    if as_json:
        where = [
            {"stage": sighting.stage, "side": sighting.side, "reason": sighting.row.get("reason")} for sighting in sightings
        ]
        print(json.dumps({**asdict(explanation), "history": where, "tokens": pieces}, ensure_ascii=False, indent=2))
        return
    history = [show_history(sightings)] if sightings else []
    print_view(*history, show_explanation(explanation, pieces[:_MOST_TOKENS]))


def _read(thing: str) -> str:
    """The text of THING. Raises SourceError for a file that is missing, unreadable or without text, RequestError for an id
    without its run."""
    from bessemer.core.errors import RequestError, SourceError
    from bessemer.data.corpus.reader import is_document_id
    from bessemer.data.sources.source import encodable

    if thing == "-":
        return encodable(sys.stdin.read())
    try:
        is_file, is_folder = Path(thing).is_file(), Path(thing).is_dir()
    except (OSError, ValueError):  # too long for a name, or a NUL in it
        is_file = is_folder = False
    if is_folder:
        raise SourceError(f"{thing}: this is a folder; name one file of it")
    if not is_file:
        if is_document_id(thing):
            raise RequestError(f"{thing}: this is the id of a document; say of which run with --run")
        if _names_a_file(thing):
            raise SourceError(
                f"{thing}: there is no such file (a text that looks like a file's name is read from standard input, with -; an "
                "address begins with https://)"
            )
        return encodable(thing)
    try:
        content = Path(thing).read_bytes()
    except OSError as error:
        raise SourceError(f"{thing}: cannot be read ({error.strerror})") from None
    if b"\0" in content:
        raise SourceError(f"{thing}: this is no text file")
    if not thing.lower().endswith(_PAGES):
        return content.decode("utf-8", errors="replace")
    from bessemer.data.extraction.extract import extract

    text = extract(content)
    if not text:
        raise SourceError(f"{thing}: no main text was found in this page")
    return text


def _names_a_file(thing: str) -> bool:
    """Whether a text looks like the name of a missing file: that is refused, rather than explained as a text."""
    if len(thing) > _LONGEST_NAME or "\n" in thing:
        return False
    return thing.lower().endswith((*_PAGES, *_OTHER_FILES)) or _FILE_NAME.fullmatch(thing) is not None


def _history(thing: str, run: str | None, runs: Path) -> list[Sighting]:
    """What became of a run's document. Raises ArtefactError for an id that the run does not have."""
    from bessemer.cli.named import open_run
    from bessemer.core.errors import ArtefactError
    from bessemer.data.corpus.reader import history, is_document_id

    if run is None or not is_document_id(thing):
        return []
    sightings = list(history(open_run(run, runs).stages().items(), thing))
    if not sightings:
        raise ArtefactError(f"{run}: it has no document {thing}")
    return sightings


def _settings(
    run: str | None, recipe: str | None, runs: Path, allow_code: bool
) -> tuple[CleanConfig | None, SelectConfig | None, Path] | None:
    """How a run or a recipe cleans and selects, and the folder that its paths start from; None where neither is given."""
    from bessemer.cli.named import open_run
    from bessemer.pipeline.recipe import load_recipe
    from bessemer.pipeline.recipe_settings import recorded_cleaning

    if recipe is not None:
        checked = load_recipe(recipe, allow_code=allow_code)
        configs: dict[str, Any] = {stage.spec.kind: stage.config for stage in checked.stages}
        return configs.get("clean"), configs.get("select"), checked.folder
    if run is None:
        return None
    return recorded_cleaning(open_run(run, runs), allow_code=allow_code)


def _pieces(text: str, name: str | None, runs: Path, *, required: bool) -> list[str]:
    """The text in the tokens of a tokenizer or, where the run has one, of a run."""
    from bessemer.cli.show import opened_tokenizer, tokenizer_folder

    if name is None or (not required and tokenizer_folder(name, runs) is None):
        return []
    from bessemer.tokenization.measure import shown_tokens

    with opened_tokenizer(name, runs) as tokenizer:
        return shown_tokens(tokenizer, text)


def train_classifier(
    good: Annotated[Path, typer.Argument(help="Texts as they should be: a folder of .txt, .md or .jsonl.")],
    bad: Annotated[Path, typer.Argument(help="Texts as they should not be.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    name: Annotated[str, typer.Option(help="What a good text is called; the column is classifier_NAME.")] = "quality",
) -> None:
    """Learn to tell two folders of texts apart, for `clean: {classifiers: [OUT]}`."""
    from bessemer.core.progress import progress_for_terminal
    from bessemer.core.store import new_folder
    from bessemer.data.filters.classifier_training import ClassifierConfig, train_classifier

    config = ClassifierConfig.parse({"name": name}, "train-classifier")
    with new_folder(out) as folder:
        measured = train_classifier(good, bad, folder, config, progress=progress_for_terminal())
    for figure, value in measured.items():
        print(f"{figure.replace('_', ' '):<24} {value:,.4g}" if isinstance(value, (int, float)) else f"{figure}: {value}")
    print(f"{out}: use it as clean.classifiers={out}")


def train_words(
    texts: Annotated[Path, typer.Argument(help="Texts that documents are to be like: a folder of .txt, .md or .jsonl.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
) -> None:
    """Count the words of a folder of texts, for `clean: {perplexity: OUT}`: how surprising documents are beside them."""
    from bessemer.core.progress import progress_for_terminal
    from bessemer.core.store import new_folder
    from bessemer.data.filters.word_model import train_word_model

    with new_folder(out) as folder:
        described = train_word_model(texts, folder, progress=progress_for_terminal())
    print(f"{out}: {described['texts']:,} texts, {described['unigrams']:,} words; use it as clean.perplexity={out}")
