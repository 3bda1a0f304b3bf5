"""Access control for training data, and what the pages' routes share: errors, threads, templates, HTML without inline
styles."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fastapi import Request
from jinja2 import Environment, PackageLoader, StrictUndefined

from bessemer.core.environment import install_advice
from bessemer.core.errors import ArtefactError, RequestError
from bessemer.pipeline import run_names
from bessemer.serving.runtime.bodies import ApiError, without_places
from bessemer.serving.runtime.clients import caller_of

if TYPE_CHECKING:
    from bessemer.pipeline.run_folder import RunFolder


def without_styles(html: str) -> str:
    """HTML of the views with styles as data, which the page's script applies: the pages' policy forbids inline styles.

    Only markup of the views is replaced: in texts, quotation marks and `<` are escaped.
    """
    html = html.replace(' style="', ' data-style="')
    return html.replace("<style>", "<pre data-sheet hidden>").replace("</style>", "</pre>")


Result = TypeVar("Result")


def templates() -> Environment:
    """The pages' templates."""
    return Environment(
        loader=PackageLoader("bessemer.webapp"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def missing(reason: str) -> ApiError:
    """The error (404) of something that does not exist."""
    return ApiError(reason, status=404, code="not_found")


def check_owner(request: Request) -> None:
    """Raises ApiError (403) for a key that may not see runs and their documents."""
    client = caller_of(request).client
    if client.id and not client.is_admin:
        raise ApiError("runs and their documents are shown with an admin key", status=403, code="not_allowed")


def shown_runs(request: Request, runs: Path | None) -> Path:
    """The folder of the runs. Raises ApiError (403) for a client that may not see them, and where no runs are shown."""
    check_owner(request)
    if runs is None:
        raise ApiError(
            "this server shows no runs: it listens to other machines, and asks for no key", status=403, code="not_allowed"
        )
    return runs


def named_run(runs: Path, name: str) -> RunFolder:
    """The run of a name. Raises ApiError (404) for anything else, such as a path."""
    # loads all stages: not when the server starts
    from bessemer.pipeline.run_folder import RunFolder

    if name not in run_names(runs):
        raise missing(f"there is no run {name!r}")
    return RunFolder(runs, name)


async def off_the_loop(work: Callable[[], Result]) -> Result:
    """Run work in a thread. A damaged file or a missing package becomes an ApiError (404) with the reason."""
    try:
        return await asyncio.to_thread(work)
    except (ArtefactError, RequestError) as error:
        raise ApiError(without_places(str(error)), status=404, code="not_available") from None
    except ModuleNotFoundError as error:
        # a server may lack the extras of data and reports
        raise ApiError(install_advice(module_of(error)), status=404, code="not_available") from None


def module_of(error: ModuleNotFoundError) -> str:
    """The missing package."""
    return (error.name or str(error)).partition(".")[0]
