"""Inputs of `bessemer finetune`: the model as a folder of ours with a chat template, and the table's columns of questions and
answers.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

from bessemer.core.errors import ArtefactError, SourceError
from bessemer.core.progress import Progress
from bessemer.core.store import new_folder
from bessemer.data.sources.io.paths import READ_BY
from bessemer.model.config import ModelConfig
from bessemer.model.formats import ModelSource, import_model
from bessemer.model.formats.gguf_import import GgufFile, in_a_family, write_tokenizer
from bessemer.model.storage.library import download
from bessemer.model.storage.model_config import TOKENIZER_FILES, holds_codes, read_decoder_config
from bessemer.model.vision.config import VisionLanguageConfig
from bessemer.model.vision.folder import is_vision_folder, read_vision_language
from bessemer.posttraining.data.formats import CONTINUE
from bessemer.posttraining.data.understanding import DataPlace, open_rows
from bessemer.posttraining.data.understanding import find_columns as columns_of
from bessemer.tokenization.chat_templates import CHAT_TEMPLATES
from bessemer.tokenization.control_tokens import TEMPLATE_TOKENS
from bessemer.tokenization.folder import CHAT_TEMPLATE_FILE
from bessemer.tokenization.formats.exchange import import_tokenizer
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer


def prepare_base(source: ModelSource, folder: Path, progress: Progress) -> Path:
    """The model's own folder if it can be tuned as it is; else `folder`, which is made from it if missing.

    A GGUF file and a model of the hub are imported; a model without a chat template gets one. Raises what `import_model` does.
    """
    if folder.exists():
        return folder
    place = source.path
    if source.kind != "folder":
        progress.say(f"importing {source.name}")
        for note in import_model(source, folder):
            progress.say(f"  note: {note}")
        place = folder
    tokenizer = load_tokenizer(place)
    if tokenizer.chat_template is not None:
        return place
    name = suitable_template(tokenizer)
    progress.say(f"  the model has no chat template: it gets {name}, whose control tokens it knows")
    if place != folder:
        with new_folder(folder) as partial:
            for file in place.iterdir():
                if file.is_file():
                    _link(file, partial / file.name)
    (folder / CHAT_TEMPLATE_FILE).write_text(CHAT_TEMPLATES[name], encoding="utf-8")
    return folder


class BaseModel(NamedTuple):
    """Settings and tokenizer of a model to be tuned, without its weights. quantised: bytes of its weights if they are
    quantised, else None. folder: its own, where it has one."""

    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    quantised: float | None
    folder: Path | None = None

    @property
    def vision(self) -> VisionLanguageConfig | None:
        """The settings of a model that reads pictures; None of another one."""
        is_vision = self.folder is not None and is_vision_folder(self.folder)
        return read_vision_language(self.folder) if is_vision and self.folder is not None else None


def read_base(source: ModelSource, scratch: Path) -> BaseModel:
    """Settings and tokenizer of the model that `prepare_base` makes, without its weights. scratch: an empty folder for the
    tokenizer's files. Raises what `import_model` does."""
    if source.kind == "gguf":
        with source.path.open("rb") as stream:
            file = GgufFile(source.path, stream)
            config = file.config()
            tokenizer = write_tokenizer(file, config, scratch, None, compact=True)[1]
        if tokenizer is None:
            raise ArtefactError(f"{source.name}: the file holds no tokenizer, and a model is tuned with its own")
        return BaseModel(source.name, in_a_family(config), _with_template(tokenizer, scratch), None)
    place, files = source.path, source.path
    if source.kind == "hub":
        place, files = download(source.name), scratch
        import_tokenizer(place, scratch)
    tokenizer = load_tokenizer(files)
    if tokenizer.chat_template is None and files != scratch:
        for name in TOKENIZER_FILES:
            if (files / name).exists():
                shutil.copyfile(files / name, scratch / name)
    quantised = float(sum(path.stat().st_size for path in place.glob("*.safetensors"))) if holds_codes(place) else None
    return BaseModel(source.name, read_decoder_config(place), _with_template(tokenizer, scratch), quantised, place)


def _with_template(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    """The tokenizer if it has a chat template; else the folder's tokenizer after a suitable template is written there."""
    if tokenizer.chat_template is not None:
        return tokenizer
    (folder / CHAT_TEMPLATE_FILE).write_text(CHAT_TEMPLATES[suitable_template(tokenizer)], encoding="utf-8")
    return load_tokenizer(folder)


def suitable_template(tokenizer: Tokenizer) -> str:
    """The first of our templates whose control tokens the tokenizer has: ChatML if possible, else the plain template, which has
    none. So no token is new, and an adapter holds everything that is learnt."""
    for name in ("chatml", "llama3"):
        # every tokenizer has an end-of-text token
        if all(tokenizer.control_id(token) is not None for token in TEMPLATE_TOKENS[name][1:]):
            return name
    return "plain"


def _link(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the disk has no such links."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def find_columns(place: DataPlace, prompt: str | None, answer: str | None) -> tuple[str, str] | None:
    """The columns of questions and of answers of a table: those that the user names, or those recognised by their names; None
    for rows in a form that needs none, such as conversations or texts. Raises SourceError where no columns are recognised, or a
    named one is missing, and as `open_rows`.
    """
    if isinstance(place, Path) and (source := READ_BY.get(place.suffix.lower())) not in _READ_HERE:
        raise SourceError(f"{place}: is no table, and no text; {{source: {source}}} reads such files, and {CONTINUE}")
    options = ("--prompt-column", "--answer-column")
    return columns_of(open_rows(place), prompt, answer, options, is_chat=True)


#: Sources of documents whose files are tables or texts, which tuning reads too.
_READ_HERE = (None, "tables", "files", "docs")
