"""The model that a fine-tuning starts from: a folder of ours with a chat template."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from bessemer.core.new_folder import new_folder
from bessemer.core.progress import Progress
from bessemer.model.formats.exchange import ModelSource, import_model
from bessemer.tokenization.chat_templates import CHAT_TEMPLATES
from bessemer.tokenization.special import TEMPLATE_TOKENS
from bessemer.tokenization.tokenizer import CHAT_TEMPLATE_FILE, Tokenizer, load_tokenizer


def prepare_base(source: ModelSource, folder: Path, progress: Progress) -> Path:
    """A model's folder itself where it can be tuned as it is; else `folder`, made of it where it is not there yet.

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


def suitable_template(tokenizer: Tokenizer) -> str:
    """The first of our templates whose control tokens a tokenizer has: ChatML's where it has them, at least the plain one, of
    words alone. So no token is new, and an adapter holds all that is learnt."""
    for name in ("chatml", "llama3"):
        # the end of a text is any tokenizer's own
        if all(tokenizer.control_id(token) is not None for token in TEMPLATE_TOKENS[name][1:]):
            return name
    return "plain"


def _link(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the disk has no such links."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
