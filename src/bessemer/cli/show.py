"""`bessemer show`: a run, a stage, a corpus, a tokenizer, token shards, a model or a preset in the terminal.

TOKENIZER on the command line is a folder, a run, or a file of another tool's format.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bessemer.cli.options import Runs, print_view

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bessemer.core.report import Metrics
    from bessemer.tokenization.tokenizer import Tokenizer


#: Files that hold a tokenizer in the formats of others.
TOKENIZER_SUFFIXES = (".json", ".gguf", ".model", ".tiktoken")

#: Characters at the beginning of a user's text whose tokens are shown.
_SHOWN_CHARACTERS = 2000

_SAMPLE = (
    "The quick brown fox jumps over 13 lazy dogs: def fox(dogs: int) -> str:\n\treturn 'über' * dogs  # 狐 🦊\n"
    "Naïve façade, 3.14159 × 10⁻², ключ, مفتاح."
)


def tokenizer_folder(name: str, runs: Path) -> Path | None:
    """The folder that a name or path means: itself, one with `tokenizer/` in it (a run, a stage), or a run's name."""
    from bessemer.core.store import follow

    for folder in (Path(name), runs / name):
        for place in (folder, folder / "tokenizer"):
            if (follow(place) / "tokenizer.json").is_file():
                return follow(place)
    return None


@contextmanager
def opened_tokenizer(name: str, runs: Path) -> Iterator[Tokenizer]:
    """A tokenizer by folder, by run, or from a file of another format, which is read into a folder that lasts as long.

    Raises ArtefactError when there is none.
    """
    from bessemer.core.errors import ArtefactError
    from bessemer.tokenization.tokenizer import load_tokenizer

    folder = tokenizer_folder(name, runs)
    if folder is not None:
        yield load_tokenizer(folder)
        return
    if not Path(name).exists():
        raise ArtefactError(f"there is no tokenizer {name!r}: not a folder with a tokenizer.json, a run, or a file of one")
    from bessemer.tokenization.formats import import_tokenizer

    with tempfile.TemporaryDirectory(prefix="bessemer-") as scratch:
        import_tokenizer(Path(name), Path(scratch) / "tokenizer")
        yield load_tokenizer(Path(scratch) / "tokenizer")


def described(name: str, runs: Path, texts: Sequence[Path]) -> dict[str, Any]:
    """Figures of a tokenizer: those of its stage's manifest; measured now for texts, and where no stage made it.

    Raises ArtefactError when there is none, SourceError for a text that cannot be read.
    """
    from bessemer.core.store import MANIFEST, read_json
    from bessemer.model.config import embedding_shares
    from bessemer.tokenization.measure import describe

    folder = tokenizer_folder(name, runs)
    if folder is not None and not texts and (folder.parent / MANIFEST).exists():
        manifest = read_json(folder.parent / MANIFEST, "manifest")
        if manifest["stage"] == "tokenize" and "by_domain" in manifest["metrics"]:
            metrics = manifest["metrics"]
            return {**metrics, "embedding_shares": embedding_shares(metrics["vocab_size"])}
    read = [_read_text(path) for path in texts]
    with opened_tokenizer(name, runs) as tokenizer:
        figures = describe(tokenizer, read[0][:_SHOWN_CHARACTERS] if read else _SAMPLE, read)
    return {**figures, "embedding_shares": embedding_shares(figures["vocab_size"])}


def _read_text(path: Path) -> str:
    from bessemer.core.errors import SourceError

    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: is not UTF-8 text (byte {error.start})") from None


def column_names(names: Sequence[str]) -> list[str]:
    """Short names for columns: the last part of each path, or the whole where two would be the same."""
    short = [Path(name).name if Path(name).name != "tokenizer" else Path(name).parent.name or name for name in names]
    return [name if short.count(name) == 1 else whole for name, whole in zip(short, names, strict=True)]


def show(
    thing: Annotated[
        str,
        typer.Argument(
            help="A run, a stage's folder, what finetune wrote, a corpus, tokenizer (also a file), shards, model, or a preset."
        ),
    ],
    against: Annotated[
        list[str], typer.Option("--against", help="Another tokenizer to compare THING with: folder, run, .json, .gguf, .model.")
    ] = [],  # noqa: B006 - typer wants the value itself
    text: Annotated[
        list[Path], typer.Option("--text", help="A text to measure tokenizers on; the first one is shown in its tokens.")
    ] = [],  # noqa: B006
    examples: Annotated[
        int, typer.Option(help="A corpus: how many kept texts to show, and how many dropped for each reason.", min=0)
    ] = 2,
    card: Annotated[bool, typer.Option("--card", help="Of a corpus: print its dataset card, in Markdown.")] = False,
    model_card: Annotated[
        bool, typer.Option("--model-card", help="Of a run: print the card of its model, in Markdown.")
    ] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Print and draw anything: a run, a stage, a corpus, a tokenizer, token shards, a model, a preset, all presets.

    A corpus is a run's `corpus`, a data stage's folder, or any folder of documents. Tokenizers are measured by kind of
    text and language, alone or beside each other.
    """
    from bessemer.model.presets import PRESETS

    if model_card:
        print(_model_card(thing, runs), end="")
    elif card:
        print(_card(thing, runs), end="")
    elif against or text or (Path(thing).is_file() and thing.endswith(TOKENIZER_SUFFIXES) and not _is_gguf_model(thing)):
        print_view(_tokenizers([thing, *against], runs, text))
    elif thing in PRESETS and not Path(thing).exists():
        print_view(_preset(thing))
    elif thing == "presets" and not Path(thing).exists():
        print_view(_presets())
    else:
        print_view(_drawn(thing, runs, examples))


def _folder(thing: str, runs: Path) -> Path:
    """The path of THING: a path, a run's name, a model's folder or GGUF file. Raises ArtefactError for anything else."""
    from bessemer.cli.named import find_model
    from bessemer.core.config import nearest
    from bessemer.core.errors import ArtefactError
    from bessemer.core.store import follow
    from bessemer.model.formats import find_model as find_source
    from bessemer.model.presets import PRESETS
    from bessemer.pipeline import run_names

    folder = follow(Path(thing))
    if folder.exists():
        return folder
    if thing in run_names(runs):
        return runs / thing
    if find_source(thing) is None:
        known = [*run_names(runs), *PRESETS]
        raise ArtefactError(f"there is no {thing!r}: not a path, a run, a model or a preset{nearest(thing, known)}")
    return find_model(thing, runs)


def _is_gguf_model(thing: str) -> bool:
    """Whether a file is a GGUF with weights in it."""
    from bessemer.model.formats import find_model

    return thing.endswith(".gguf") and find_model(thing) is not None


def _drawn(thing: str, runs: Path, examples: int) -> RenderableType:
    from bessemer.cli.named import open_run
    from bessemer.core.errors import ArtefactError
    from bessemer.core.store import MANIFEST
    from bessemer.model.storage.tuned_folder import is_tuned
    from bessemer.pipeline.report import gather
    from bessemer.views import terminal

    folder = _folder(thing, runs)
    if folder.suffix == ".gguf" and folder.is_file():
        return _gguf(folder, runs)
    if (folder / "run.json").exists():
        return terminal.show_run(gather(open_run(str(folder), runs)))
    if is_tuned(folder):
        return _tuned(folder)
    if (folder / "config.json").exists():
        return _model(folder)
    if (folder / "tokenizer.json").exists():
        return _tokenizers([str(folder)], runs, [])
    if (folder / MANIFEST).exists():
        return _stage(folder, examples)
    # the folder may be `documents`, `rejected` or `tokens` of a stage
    if (folder.parent / MANIFEST).exists():
        return _stage(folder.parent, examples)
    if documents := _bare_documents(folder):
        from bessemer.data.corpus.stats import folder_stats
        from bessemer.views.data_terminal import show_corpus

        return show_corpus({documents.name: folder_stats(documents)}, examples=examples)
    raise ArtefactError(f"{thing}: holds nothing that Bessemer made (no manifest, config.json or tokenizer.json)")


def _bare_documents(folder: Path) -> Path | None:
    """The folder of documents that a folder is or holds, without a manifest."""
    from bessemer.data.corpus.reader import holds_documents

    return next((place for place in (folder, folder / "documents") if holds_documents(place)), None)


def _model_card(thing: str, runs: Path) -> str:
    """The card of a run's model. Raises ArtefactError for what is no run."""
    from bessemer.core.errors import ArtefactError
    from bessemer.pipeline.model_card import model_card
    from bessemer.pipeline.run_folder import RunFolder

    folder = _folder(thing, runs)
    if not (folder / "run.json").is_file():
        raise ArtefactError(f"{thing}: --model-card is of a run, and this is none")
    return model_card(RunFolder(folder.parent, folder.name))


def _card(thing: str, runs: Path) -> str:
    """The dataset card of a corpus. Raises ArtefactError when there is no data stage's folder of that name."""
    from bessemer.core.errors import ArtefactError
    from bessemer.core.store import follow
    from bessemer.data.corpus.dataset_card import dataset_card, lineage
    from bessemer.data.corpus.reader import holds_documents

    folder = _folder(thing, runs)
    folder = follow(folder / "corpus") if (folder / "run.json").exists() else folder
    inside = folder.parent if holds_documents(folder) else folder
    line = lineage(inside / "documents")
    if not line or "documents_out" not in line[-1].metrics:
        raise ArtefactError(f"{thing}: a card tells what the manifests of data stages say, and there is none here")
    return dataset_card(line)


def _stage(folder: Path, examples: int) -> RenderableType:
    """One stage's folder, from its manifest; of a data stage the stages that led to it."""
    from bessemer.core.store import Artefact
    from bessemer.views import terminal

    manifest = Artefact(folder.name, folder).manifest
    stage, metrics = manifest["stage"], manifest["metrics"]
    if "documents_out" in metrics:
        from bessemer.data.corpus.dataset_card import lineage
        from bessemer.views.data_terminal import show_corpus

        line = lineage(folder / "documents")
        stages: dict[str, Metrics] = {}
        for record in line:
            # a kind of stage may occur twice
            name = record.name if record.name not in stages else f"{record.name} {len(stages) + 1}"
            stages[name] = record.metrics
        return show_corpus(stages, examples=examples)
    if stage == "tokenize":
        return _tokenizers([str(folder)], Path(), [])
    if stage == "model":
        return terminal.show_model(metrics)
    return terminal.show_facts(stage, {"made": manifest["created"], "seconds": manifest["seconds"], **metrics})


def _tokenizers(names: list[str], runs: Path, texts: list[Path]) -> RenderableType:
    """One tokenizer, or several side by side."""
    from bessemer.views import terminal

    figures = [described(name, runs, texts) for name in names]
    if len(figures) == 1:
        return terminal.show_tokenizer(figures[0])
    return terminal.show_tokenizers(dict(zip(column_names(names), figures, strict=True)))


def _model(folder: Path) -> RenderableType:
    from rich.console import Group

    from bessemer.core.store import read_json
    from bessemer.model.config import model_metrics
    from bessemer.model.storage.model_config import read_model_config
    from bessemer.views import terminal
    from bessemer.views.parts_terminal import section

    drawn = terminal.show_model(model_metrics(read_model_config(folder)))
    quality = folder / "quality.json"
    if not quality.exists():
        return drawn
    return Group(drawn, *section("Before and after quantisation", terminal.show_quality(read_json(quality))))


def _tuned(out: Path) -> RenderableType:
    """A fine-tuning: its verdict, answers before and after, and the model."""
    from rich.console import Group
    from rich.text import Text

    from bessemer.model.storage.tuned_folder import read_record, tuned_model
    from bessemer.posttraining.sft.report import record_lines
    from bessemer.views import terminal

    record, tuned = read_record(out), tuned_model(out)
    assert tuned is not None
    facts = {"method": record["result"]["method"], "model": str(tuned.folder)}
    if tuned.adapter is not None:
        facts["adapter"] = str(tuned.adapter)
    lines = [Text(line) for line in record_lines(record["result"])]
    return Group(terminal.show_facts("fine-tuning", facts), *lines, _model(tuned.folder))


def _gguf(file: Path, runs: Path) -> RenderableType:
    """The model in a GGUF file, and its tokenizer."""
    from rich.console import Group

    from bessemer.model.config import model_metrics
    from bessemer.model.formats.gguf_import import read_gguf_config
    from bessemer.views import terminal

    return Group(terminal.show_model(model_metrics(read_gguf_config(file))), _tokenizers([str(file)], runs, []))


def _preset(name: str) -> RenderableType:
    from bessemer.model.config import model_metrics, preset_config
    from bessemer.model.presets import PRESET_VOCABULARIES
    from bessemer.views import terminal

    figures = model_metrics(preset_config(name, PRESET_VOCABULARIES[name]), bytes_per_value=2)
    return terminal.show_model({"preset": name, **figures}, values="bfloat16")


def _presets() -> RenderableType:
    from bessemer.model.config import model_metrics, preset_config
    from bessemer.model.presets import PRESET_VOCABULARIES, PRESETS
    from bessemer.views import terminal

    return terminal.show_presets({name: model_metrics(preset_config(name, PRESET_VOCABULARIES[name])) for name in PRESETS})
