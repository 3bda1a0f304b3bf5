"""`bessemer train-classifier` and `bessemer train-words`: what `clean` scores documents with, learned from folders of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train_classifier(
    good: Annotated[Path, typer.Argument(help="Texts as they should be: a folder of .txt, .md or .jsonl.")],
    bad: Annotated[Path, typer.Argument(help="Texts as they should not be.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    name: Annotated[str, typer.Option(help="What a good text is called; the column is classifier_NAME.")] = "quality",
) -> None:
    """Learn to tell two folders of texts apart, for `clean: {classifiers: [OUT]}`."""
    from bessemer.core.new_folder import new_folder
    from bessemer.core.progress import progress_for_terminal
    from bessemer.data.classifier.config import ClassifierConfig
    from bessemer.data.classifier.training import train_classifier

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
    from bessemer.core.new_folder import new_folder
    from bessemer.core.progress import progress_for_terminal
    from bessemer.data.filters.word_model import train_word_model

    with new_folder(out) as folder:
        described = train_word_model(texts, folder, progress=progress_for_terminal())
    print(f"{out}: {described['texts']:,} texts, {described['unigrams']:,} words; use it as clean.perplexity={out}")
