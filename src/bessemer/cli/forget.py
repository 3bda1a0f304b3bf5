"""`bessemer forget`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from bessemer.cli.memorisation import Formats, formats_of
from bessemer.cli.options import Device

if TYPE_CHECKING:
    from bessemer.pipeline.forget import Traces

#: Characters of a passage that are shown.
_SHOWN = 60


def forget(
    identity: Annotated[str, typer.Argument(metavar="ID", help="A document's id: 32 hexadecimal digits.")],
    copies: Annotated[bool, typer.Option("--copies", help="Forget its known copies too.")] = False,
    remove_derived: Annotated[
        bool,
        typer.Option(
            "--remove-derived", help="Remove the artefacts that were made from it, so that the next run makes them again."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the artefacts that hold it and the models that saw it; change nothing.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Try to extract it from the models that saw it, in several formats of their weights; exit code 1 where it "
            "succeeds.",
        ),
    ] = False,
    formats: Formats = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    device: Device = "auto",
    runs: Annotated[Path, typer.Option(help="Folder of the runs and their store.")] = Path("runs"),
) -> None:
    """Take a document out of every corpus, and name the artefacts and models that saw it.

    It cannot be undone. The sources keep it; the store's forgotten.txt keeps it from being collected again.
    """
    from bessemer.core.errors import ArtefactError, RequestError
    from bessemer.data.corpus.reader import is_document_id
    from bessemer.pipeline.forget import forget as take_out
    from bessemer.pipeline.forget import remove_derived as remove
    from bessemer.pipeline.forget import trace

    if not is_document_id(identity):
        raise RequestError(f"{identity!r} is not the id of a document, which has 32 hexadecimal digits")
    if not (runs / ".store").is_dir():
        raise ArtefactError(f"{runs}: there is no store here")
    all_traces = [first := trace(runs, identity)]
    if copies:
        all_traces += [trace(runs, copy.identity, copies=False) for copy in first.copies]
    for traces in all_traces:
        _tell(traces)
    if not any(traces.holdings for traces in all_traces):
        raise ArtefactError(f"{runs}: no corpus here holds {identity}, and none has forgotten it")
    # before it is taken out, which leaves no text to test with
    succeeds = [one for traces in all_traces for one in _extracted(traces, formats, device)] if check else []
    to_remove = (
        list(dict.fromkeys(derived.key for traces in all_traces for derived in traces.derived)) if remove_derived else []
    )
    if dry_run or not (any(traces.present for traces in all_traces) or to_remove):
        _refuse(succeeds)
        return
    question = f"Take {'them' if len(all_traces) > 1 else 'it'} out" + (
        f" and remove {len(to_remove)} artefacts" if to_remove else ""
    )
    if not yes and not typer.confirm(f"{question}? This cannot be undone."):
        raise typer.Exit(1)
    for traces in all_traces:
        take_out(runs, traces)
    remove(runs, to_remove)
    print("Done." + (" The next `bessemer run` makes again what was removed." if to_remove else ""))
    _refuse([one for one in succeeds if one.key not in to_remove])


class _Extracted(NamedTuple):
    """A model, and a format of its weights, out of which the document was got."""

    key: str
    weights: str


def _extracted(traces: Traces, formats: str | None, device: str) -> list[_Extracted]:
    """Ask every model that saw the document for its passages, and say what came; raises RequestError as `recall_document`."""
    from bessemer.core.errors import ArtefactError
    from bessemer.core.progress import progress_for_terminal
    from bessemer.pipeline.forget import models_of, texts_of
    from bessemer.safety.memorisation.config import ORIGINAL, DocumentConfig
    from bessemer.safety.memorisation.measures import opened_in, recall_document

    texts, models, progress = texts_of(traces), models_of(traces), progress_for_terminal()
    if not texts:
        raise ArtefactError(f"{traces.identity}: no corpus holds its text any more, so no model can be asked for it")
    found = []
    for model in models:
        chosen = [ORIGINAL] if model.is_quantised else formats_of(formats, model.folder)
        config = DocumentConfig.parse({"formats": chosen}, "--formats")
        for weights in config.formats:
            with opened_in(model.folder, weights, device) as engine:
                passages = [one for text in texts for one in recall_document(engine, text, config, progress, model.key)]
            extracted = [one for one in passages if one.recall.is_extracted(config)]
            if extracted:
                found.append(_Extracted(model.key, weights))
            likeliest = min(passages, key=lambda one: one.recall.nats / one.recall.tokens)
            said = f"{len(extracted)} of {len(passages)} passages are extracted" if extracted else "nothing is extracted"
            shown = " ".join(likeliest.text.split())[:_SHOWN]
            print(f"  {model.key}, {weights}: {said}; likeliest, {likeliest.recall.nats:.1f} nats: {shown!r}")
    return found


def _refuse(succeeds: Sequence[_Extracted]) -> None:
    """Say which models and formats are not safe, and exit with code 1."""
    if succeeds:
        keys = list(dict.fromkeys(one.key for one in succeeds))
        named = "; ".join(f"{key} in {', '.join(one.weights for one in succeeds if one.key == key)}" for key in keys)
        print(f"Not safe, the document can be extracted: {named}. Make them again without it, or unlearn it and check again.")
        raise typer.Exit(1)


def _tell(traces: Traces) -> None:
    """Everything that is known of a document, in lines."""
    print(f"Document {traces.identity}")
    for holding in traces.holdings:
        state = f"forgotten on {holding.forgotten}" if holding.forgotten else holding.side
        print(f"  in {holding.key}: {state} ({holding.split})")
    if traces.derived and not traces.was_trained_on:
        print("  It is held out for validation: models were measured on it and not trained on it.")
    for derived in traces.derived:
        runs = f" (run {', '.join(derived.runs)})" if derived.runs else ""
        print(f"  saw it: {derived.key}{runs}: {derived.remedy}")
    for copy in traces.copies:
        print(f"  copy: {copy.identity}: {copy.why}")
    for path in traces.unfinished:
        print(f"  may hold it: {path}, interrupted work, which `bessemer clean` removes")
