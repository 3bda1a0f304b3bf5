"""Steps of the stage `clean`: the edits and scorers that its settings name, as functions.

A filter's code is imported when it is asked for: some load models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pyarrow as pa

from bessemer.core.config import Config
from bessemer.core.errors import ConfigError
from bessemer.core.hashing import hash_file
from bessemer.core.store import follow
from bessemer.core.usercode import is_user_function, load_user_function
from bessemer.data.config import CleanConfig
from bessemer.data.edits.registry import edit_plugin
from bessemer.data.filters.registry import PERPLEXITY, filter_plugin
from bessemer.data.plugins import arrow_types
from bessemer.data.text.texts import Texts

if TYPE_CHECKING:
    from bessemer.data.filters.perplexity import OpenModel


T = TypeVar("T")


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
        return Scorer(column, {column: pa.float64()}, partial(_user_scores, function, name, column))
    plugin = filter_plugin(name)
    return Scorer(name, arrow_types(plugin.columns), _with_settings(plugin.load(), plugin.settings), plugin.reads)


def _with_settings(function: Callable[..., T], kind: type[Config] | None, settings: Config | None = None) -> Callable[..., T]:
    """The function with its settings, the usual ones where the recipe states none."""
    return function if kind is None else partial(function, settings=settings or kind())


def scorers(config: CleanConfig, folder: Path = Path(), open_model: OpenModel | None = None) -> list[Scorer]:
    """All scorers that the settings ask for: by name, and made from the user's lists, classifiers and models.

    Paths are relative to `folder`. open_model: opens a language model of ours, when it is first asked.
    Raises ConfigError or ArtefactError for one that cannot be read.
    """
    made = [scorer(name, folder) for name in config.score]
    for path in config.word_lists:
        from bessemer.data.filters.words import words_scorer

        words = words_scorer(folder / path)
        made.append(Scorer(f"words {path}", words.columns, words.function))
    for path in config.url_lists:
        from bessemer.data.filters import urls

        own = arrow_types(filter_plugin("urls").columns)
        columns = {f"{kind}_{Path(path).stem}": type_ for kind, type_ in own.items()}
        blocklist = urls.read_blocklist(folder / path)
        made.append(Scorer(f"urls {path}", columns, partial(_renamed, partial(urls.urls, blocklist=blocklist), columns), "url"))
    for path in config.classifiers:
        from bessemer.data.classifier.model import classifier_columns, classifier_scores, load_classifier

        classifier = load_classifier(follow(folder / path))
        made.append(Scorer(f"classifier {path}", classifier_columns(classifier), classifier_scores(classifier)))
    if config.perplexity is not None:
        made.append(_perplexity(follow(folder / config.perplexity), open_model))
    return made


def _perplexity(place: Path, open_model: OpenModel | None) -> Scorer:
    from bessemer.data.filters import perplexity

    model = perplexity.language_model_folder(place)
    if model is None:
        from bessemer.data.filters.word_model import load_word_model

        bits_per_byte = load_word_model(place).bits_per_byte
    elif open_model is None:
        raise ConfigError(f"clean.perplexity: {place} is a model for PyTorch, which only `bessemer` and its Python API open")
    else:
        # not before it is needed: a schema asks for columns alone
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
        # a list's name is in its columns
        named_files += [[Path(name).stem, path.relative_to(place.parent).as_posix(), hash_file(path)] for path in files]
    if config.perplexity is not None:
        named_files += [["perplexity", path.name, hash_file(path)] for path in _model_files(follow(folder / config.perplexity))]
    return named_files


def _model_files(place: Path) -> list[Path]:
    """The files of a model of words, or of a language model with its tokenizer."""
    from bessemer.data.filters.perplexity import language_model_folder

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
        return Edit(name.rpartition(":")[2], {}, partial(_user_edit, load_user_function(name, folder), name))
    plugin = edit_plugin(name)
    return Edit(name, arrow_types(plugin.columns), _with_settings(plugin.load(), plugin.settings, settings))


def _user_scores(function: Callable[[pa.Array], Iterable[float]], name: str, column: str, texts: Texts) -> dict[str, pa.Array]:
    scores = _called(function, name, texts, "scores", "one number per text is needed")
    try:
        return {column: scores.cast(pa.float64())}
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{name}: its scores are not numbers ({error})") from None


def _user_edit(function: Callable[[pa.Array], Iterable[str]], name: str, texts: Texts) -> tuple[pa.Array, dict[str, pa.Array]]:
    edited = _called(function, name, texts, "texts", "one text per text is needed")
    if edited.null_count or not (pa.types.is_string(edited.type) or pa.types.is_large_string(edited.type)):
        raise ConfigError(f"{name}: it returned {edited.type}; an edit returns a string for each text")
    return edited.cast(pa.string()), {}


def _called(function: Callable[[pa.Array], Iterable], name: str, texts: Texts, what: str, needed: str) -> pa.Array:
    try:
        returned = function(texts.array)
        result = returned if isinstance(returned, (pa.Array, pa.ChunkedArray)) else pa.array(list(returned))
    except Exception as error:  # anything a user's function may raise
        raise ConfigError(f"{name}: it failed: {type(error).__name__}: {error}") from error
    if len(result) != len(texts):
        raise ConfigError(f"{name}: it returned {len(result)} {what} for {len(texts)} texts; {needed}")
    return result.combine_chunks() if isinstance(result, pa.ChunkedArray) else result
