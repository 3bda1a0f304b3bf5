"""`bessemer forget`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from bessemer.pipeline.forget import Traces


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
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
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
    to_remove = (
        list(dict.fromkeys(derived.key for traces in all_traces for derived in traces.derived)) if remove_derived else []
    )
    if dry_run or not (any(traces.present for traces in all_traces) or to_remove):
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
