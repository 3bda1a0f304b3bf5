"""Access control for training data, and what the routes share: errors, work off the event loop, styles apart from drawn HTML.

The pages' policy allows no inline styles, so a drawing is sent with its styles beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fastapi import Request

from bessemer.core.environment import install_advice
from bessemer.core.errors import ArtefactError, RequestError
from bessemer.pipeline import run_names
from bessemer.serving.runtime.bodies import ApiError
from bessemer.serving.runtime.clients import caller_of

if TYPE_CHECKING:
    from bessemer.pipeline.run_folder import RunFolder


def without_styles(html: str) -> str:
    """The same with its styles beside it: the page's script sets them.

    In texts a quotation mark is `&#34;`, and `<` is `&lt;`, so only what the views themselves wrote is found.
    """
    html = html.replace(' style="', ' data-style="')
    return html.replace("<style>", "<pre data-sheet hidden>").replace("</style>", "</pre>")


Result = TypeVar("Result")


def missing(reason: str) -> ApiError:
    """The error of something that is not there."""
    return ApiError(reason, status=404, code="not_found")


def check_owner(request: Request) -> None:
    """Raises ApiError (403) for a key that may not see what models are made of: runs, and the documents in them."""
    client = caller_of(request).client
    if client.id and not client.is_admin:
        raise ApiError("runs and their documents are shown with an admin key", status=403, code="not_allowed")


def shown_runs(request: Request, runs: Path | None) -> Path:
    """The folder of the runs, for a client that may see them. Raises ApiError (403) for another, and where none are shown."""
    check_owner(request)
    if runs is None:
        raise ApiError(
            "this server shows no runs: it listens to other machines, and asks for no key", status=403, code="not_allowed"
        )
    return runs


def named_run(runs: Path, name: str) -> RunFolder:
    """The run of a name. Raises ApiError (404) for anything that is no run's name, a path among them."""
    # the stages take a moment to load, and a server that nobody asks for them starts without
    from bessemer.pipeline.run_folder import RunFolder

    if name not in run_names(runs):
        raise missing(f"there is no run {name!r}")
    return RunFolder(runs, name)


async def off_the_loop(work: Callable[[], Result]) -> Result:
    """Work beside the event loop; what is wrong on the disk, or not installed, is the client's to read."""
    try:
        return await asyncio.to_thread(work)
    except (ArtefactError, RequestError) as error:
        raise ApiError(str(error), status=404, code="not_available") from None
    except ModuleNotFoundError as error:
        # a server needs neither the data engine nor the report's pictures
        raise ApiError(install_advice(module_of(error)), status=404, code="not_available") from None


def module_of(error: ModuleNotFoundError) -> str:
    """The package that is missing."""
    return (error.name or str(error)).partition(".")[0]
