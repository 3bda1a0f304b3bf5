"""A stage of a recipe and the artefact that a run has of it."""

from __future__ import annotations

from dataclasses import dataclass

from bessemer.core.store import Artefact
from bessemer.pipeline.recipe import Stage


@dataclass(frozen=True)
class Made:
    """A stage's artefact, and whether this run made it."""

    stage: Stage
    artefact: Artefact
    reused: bool
