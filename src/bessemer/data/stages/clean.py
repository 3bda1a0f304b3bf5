"""Stage `clean`: edits texts, then scores them. Only documents that an edit empties are dropped: `select` applies limits.

The settings name edits and scorers; the steps are functions made of them. A filter's code is imported when it is used: some
load models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bessemer.core.config import Config
from bessemer.core.errors import ConfigError
from bessemer.core.hashing import hash_file
from bessemer.core.progress import Progress
from bessemer.core.store import follow
from bessemer.core.usercode import is_user_function, load_user_function
from bessemer.data.config import CleanConfig
from bessemer.data.corpus.reader import document_schema
from bessemer.data.corpus.stats import with_reasons
from bessemer.data.corpus.writer import as_type
from bessemer.data.edits.registry import edit_plugin
from bessemer.data.filters.registry import PERPLEXITY, filter_plugin
from bessemer.data.filters.word_model import OpenModel
from bessemer.data.plugins import arrow_types
from bessemer.data.sources.io.fetch import Clock, tried_again
from bessemer.data.stages.transform import Change, transform
from bessemer.data.text.texts import Texts, rehashed

if TYPE_CHECKING:
    from bessemer.data.filters.word_model import OpenModel


T = TypeVar("T")

#: The column of a step's result that says, by document, why a user's function failed on it; null where it did not.
FAILED = "(failed)"
#: Attempts after the first, where waiting may help.
_RETRIES = 3
#: Failures on a part's first documents after which a function counts as broken.
_MOST_FAILED_AT_FIRST = 100
_LONGEST_REASON = 200
_VALUES = re.compile(r"'[^']*'|\"[^\"]*\"|\b\d+(\.\d+)?\b")


@dataclass(frozen=True)
class Scorer:
    """A pure function from texts to score columns, and which columns those are."""

    name: str
    columns: Mapping[str, pa.DataType]
    function: Callable[[Texts], Mapping[str, pa.Array]]
    #: The documents' column that it reads: what is missing there is the empty string.
    reads: str = "text"


@dataclass(frozen=True)
class Edit:
    """A pure function from texts to other texts and columns that count what was changed."""

    name: str
    columns: Mapping[str, pa.DataType]
    function: Callable[[Texts], tuple[pa.Array, Mapping[str, pa.Array]]]


def scorer(name: str, folder: Path = Path()) -> Scorer:
    """The scorer of a name, or of a user's `file.py:function`. Raises ConfigError when such a function cannot be loaded."""
    if is_user_function(name):
        column = name.rpartition(":")[2]
        function = load_user_function(name, folder)
        call = _UserCall(function, name, "score", pa.float64(), partial(_numbers, name))
        return Scorer(column, {column: pa.float64()}, partial(_user_scores, call, column))
    plugin = filter_plugin(name)
    return Scorer(name, arrow_types(plugin.columns), _with_settings(plugin.load(), plugin.settings), plugin.reads)


def _with_settings(function: Callable[..., T], kind: type[Config] | None, settings: Config | None = None) -> Callable[..., T]:
    """The function with its settings, the usual ones where the recipe states none."""
    return function if kind is None else partial(function, settings=settings or kind())


def scorers(config: CleanConfig, folder: Path = Path(), open_model: OpenModel | None = None) -> list[Scorer]:
    """All scorers that the settings ask for: by name, and made from the user's lists, classifiers and models.

    Paths are relative to `folder`. open_model: opens a language model of ours, with the first text.
    Raises ConfigError or ArtefactError for one that cannot be read.
    """
    made = [scorer(name, folder) for name in config.score]
    for path in config.word_lists:
        from bessemer.data.filters.word_list_scores import words_scorer

        words = words_scorer(folder / path)
        made.append(Scorer(f"words {path}", words.columns, words.function))
    for path in config.url_lists:
        from bessemer.data.filters import urls

        own = arrow_types(filter_plugin("urls").columns)
        columns = {f"{kind}_{Path(path).stem}": type_ for kind, type_ in own.items()}
        blocklist = urls.read_blocklist(folder / path)
        made.append(Scorer(f"urls {path}", columns, partial(_renamed, partial(urls.urls, blocklist=blocklist), columns), "url"))
    for path in config.classifiers:
        from bessemer.data.filters.classifier import classifier_columns, classifier_scores, load_classifier

        classifier = load_classifier(follow(folder / path))
        made.append(Scorer(f"classifier {path}", classifier_columns(classifier), classifier_scores(classifier)))
    if config.perplexity is not None:
        made.append(_perplexity(follow(folder / config.perplexity), open_model))
    return made


def _perplexity(place: Path, open_model: OpenModel | None) -> Scorer:
    from bessemer.data.filters import word_model as perplexity

    model = perplexity.language_model_folder(place)
    if model is None:
        from bessemer.data.filters.word_model import load_word_model

        bits_per_byte = load_word_model(place).bits_per_byte
    elif open_model is None:
        raise ConfigError(f"clean.perplexity: {place} is a model for PyTorch, which only `bessemer` and its Python API open")
    else:
        # opened with the first text: a schema needs the columns only
        opened = cache(partial(open_model, model))

        def bits_per_byte(texts: Texts) -> np.ndarray:
            return opened()(texts)

    return Scorer("perplexity", arrow_types(PERPLEXITY), perplexity.perplexity_scores(bits_per_byte))


def _renamed(
    function: Callable[[Texts], Mapping[str, pa.Array]], columns: Mapping[str, pa.DataType], texts: Texts
) -> dict[str, pa.Array]:
    return dict(zip(columns, function(texts).values(), strict=True))


def outside_files(config: CleanConfig, folder: Path) -> list[list[str]]:
    """The files of lists, classifiers and models that the settings name, with their hashes. Raises ConfigError without them."""
    named = [*config.word_lists, *config.url_lists, *config.classifiers]
    named_files = []
    for name in named:
        place = follow(folder / name)
        if not place.exists():
            raise ConfigError(f"clean: there is no file or folder {place}")
        files = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
        # the list's name enters the key, since columns are named after it
        named_files += [[Path(name).stem, path.relative_to(place.parent).as_posix(), hash_file(path)] for path in files]
    if config.perplexity is not None:
        named_files += [["perplexity", path.name, hash_file(path)] for path in _model_files(follow(folder / config.perplexity))]
    return named_files


def _model_files(place: Path) -> list[Path]:
    """The files of a model of words, or of a language model with its tokenizer."""
    from bessemer.data.filters.word_model import language_model_folder

    if not place.exists():
        raise ConfigError(f"clean.perplexity: there is no folder {place}")
    model = language_model_folder(place) or place
    return sorted(path for path in model.iterdir() if path.suffix in (".json", ".npz", ".safetensors", ".jinja"))


def edits(config: CleanConfig, folder: Path = Path()) -> list[Edit]:
    """All edits that the settings ask for, each with its own. Raises ConfigError when a user's function cannot be loaded."""
    made = []
    for name in config.edit:
        section = None if is_user_function(name) else edit_plugin(name).section
        made.append(edit(name, folder, getattr(config, section) if section else None))
    return made


def edit(name: str, folder: Path = Path(), settings: Config | None = None) -> Edit:
    """The edit of a name, or of a user's `file.py:function`. Raises ConfigError when such a function cannot be loaded."""
    if is_user_function(name):
        call = _UserCall(load_user_function(name, folder), name, "text", pa.string(), partial(_strings, name))
        return Edit(name.rpartition(":")[2], {}, partial(_user_edit, call))
    plugin = edit_plugin(name)
    return Edit(name, arrow_types(plugin.columns), _with_settings(plugin.load(), plugin.settings, settings))


class _UserCall:
    """A user's function of texts, called again with halves of a batch on which it fails, so that only the documents at
    fault are lost. Where a network may have failed it, it is first called again with the same, after growing waits.

    `checked` casts what it returned for some texts, and raises ConfigError for what is no answer. Raises ConfigError when the
    function fails on each of the first documents.
    """

    def __init__(
        self,
        function: Callable[[pa.Array], Iterable[Any]],
        name: str,
        what: str,
        kind: pa.DataType,
        checked: Callable[[pa.Array], pa.Array],
        clock: Clock | None = None,
    ) -> None:
        self._function = function
        self._name = name
        self._what = what
        self._kind = kind
        self._checked = checked
        self._clock = clock or Clock()
        self._answered = False
        self._failed = 0

    def __call__(self, texts: pa.Array) -> tuple[pa.Array, dict[str, pa.Array]]:
        """The results, null where there is none, and the column `FAILED` where there is any such."""
        reasons: dict[int, str] = {}
        results = pa.concat_arrays(list(self._results(texts, 0, reasons, may_wait=True)))
        failed = pa.array([reasons.get(place) for place in range(len(texts))], pa.string())
        return results, {FAILED: failed} if reasons else {}

    def _results(self, texts: pa.Array, start: int, reasons: dict[int, str], *, may_wait: bool = False) -> Iterator[pa.Array]:
        try:
            result = tried_again(partial(self._asked, texts), _RETRIES if may_wait or len(texts) == 1 else 0, self._clock)
        except Exception as error:  # anything a user's function may raise
            if len(texts) > 1:
                half = len(texts) // 2
                yield from self._results(texts[:half], start, reasons)
                yield from self._results(texts[half:], start + half, reasons)
                return
            self._failed += 1
            why = f"{self._name}: it failed: {type(error).__name__}: {error}"
            if not self._answered and self._failed == _MOST_FAILED_AT_FIRST:
                raise ConfigError(f"{why}; and so it did on each of the first {self._failed} documents") from error
            reasons[start] = "clean: " + _without_values(why)
            yield pa.nulls(1, self._kind)
        else:
            if len(result) != len(texts):
                raise ConfigError(
                    f"{self._name}: it returned {len(result)} {self._what}s for {len(texts)} texts; one {self._what} per text "
                    "is needed"
                )
            self._answered |= bool(len(texts))
            yield self._checked(result)

    def _asked(self, texts: pa.Array) -> pa.Array:
        returned = self._function(texts)
        result = returned if isinstance(returned, (pa.Array, pa.ChunkedArray)) else pa.array(list(returned))
        return result.combine_chunks() if isinstance(result, pa.ChunkedArray) else result


def _without_values(message: str) -> str:
    """The first line of an error without what it quotes and its numbers, so that errors of one kind count as one."""
    lines = message.splitlines()
    return _VALUES.sub("…", lines[0] if lines else "")[:_LONGEST_REASON]


def check_failures(config: CleanConfig, metrics: Mapping[str, Any]) -> None:
    """Raises ConfigError when a user's function failed on most documents: it is wrong, not they."""
    for name in filter(is_user_function, [*config.edit, *config.score]):
        reasons = {
            reason: count["documents"]
            for reason, count in metrics["by_reason"].items()
            if reason.startswith(_without_values(f"clean: {name}: it failed"))
        }
        failed, total = sum(reasons.values()), metrics["documents_in"]
        if failed > total / 2:
            most = max(reasons, key=lambda reason: reasons[reason]).removeprefix("clean: ")
            raise ConfigError(f"{most}; so it was with {failed:,} of {total:,} documents")


def _user_scores(call: _UserCall, column: str, texts: Texts) -> dict[str, pa.Array]:
    scores, failed = call(texts.array)
    return {column: scores} | failed


def _numbers(name: str, scores: pa.Array) -> pa.Array:
    try:
        return scores.cast(pa.float64())
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{name}: its scores are not numbers ({error})") from None


def _user_edit(call: _UserCall, texts: Texts) -> tuple[pa.Array, dict[str, pa.Array]]:
    edited, failed = call(texts.array)
    return pc.coalesce(edited, texts.array) if failed else edited, failed


def _strings(name: str, edited: pa.Array) -> pa.Array:
    if edited.null_count or not (pa.types.is_string(edited.type) or pa.types.is_large_string(edited.type)):
        raise ConfigError(f"{name}: it returned {edited.type}; an edit returns a string for each text")
    return edited.cast(pa.string())


_EMPTIED = "clean: nothing is left"


def clean(
    config: CleanConfig,
    documents: Path,
    out: Path,
    *,
    progress: Progress | None = None,
    folder: Path = Path(),
    open_model: OpenModel | None = None,
) -> dict[str, Any]:
    """Write the documents with their scores to `out/documents`, and return the stage's metrics.

    A user's `file.py:function` (relative to `folder`) gets an Arrow array of texts and returns one number for each;
    its column has the function's name. A document on which it fails is rejected. open_model: opens a language model for the
    score `perplexity`.
    Raises ConfigError when such a function cannot be loaded, fails on most documents, or gives what is no answer.
    """
    schema = cleaned_schema(config, document_schema(documents), folder, open_model)
    metrics = transform(
        documents,
        out,
        schema,
        partial(cleaning, config, schema, folder.absolute(), open_model),
        "editing and scoring documents" if config.edit else "scoring documents",
        engine=config.where(),
        storage=config.storage,
        progress=progress,
    )
    check_failures(config, metrics)
    return metrics


def cleaned_schema(config: CleanConfig, schema: pa.Schema, folder: Path, open_model: OpenModel | None = None) -> pa.Schema:
    """A schema with the columns that the edits and scores add to it, in the order of the settings."""
    added = [each.columns for each in edits(config, folder)] + [each.columns for each in scorers(config, folder, open_model)]
    for columns in added:
        for name, kind in columns.items():
            if name not in schema.names:
                schema = schema.append(pa.field(name, kind))
    return schema


def cleaning(config: CleanConfig, schema: pa.Schema, folder: Path, open_model: OpenModel | None = None) -> Change:
    """The function that edits and scores a batch of documents."""
    steps = edits(config, folder)
    measures = scorers(config, folder, open_model)

    def change(batch: pa.RecordBatch) -> pa.RecordBatch:
        before = batch.column("text")
        texts, columns = Texts.from_arrow(before), {name: batch.column(name) for name in batch.schema.names}
        failures = []
        for step in steps:
            edited, counts = step.function(texts)
            texts = Texts.from_arrow(edited)
            failures.append(counts.get(FAILED))
            columns |= counts
        for measure in measures:
            scores = measure.function(texts if measure.reads == "text" else _texts_of(batch.column(measure.reads)))
            failures.append(scores.get(FAILED))
            columns |= scores
        blank = pc.equal(pc.binary_length(pc.utf8_trim_whitespace(texts.array)), 0)
        # a dropped document keeps its text, for the report
        columns["text"] = pc.if_else(blank, before, texts.array)
        if steps:
            columns["text_hash"] = rehashed(before, columns["text"], batch.column("text_hash"))
        rows = pa.RecordBatch.from_arrays([as_type(columns[field.name], field.type) for field in schema], schema=schema)
        reasons = [pc.if_else(blank, pa.scalar(_EMPTIED), pa.scalar(None, pa.string())), *failures]
        return with_reasons(rows, pc.coalesce(*(reason for reason in reasons if reason is not None)))

    return change


def _texts_of(column: pa.Array) -> Texts:
    return Texts.from_arrow(pc.fill_null(column, ""))
