"""The stages a recipe may name, in the order in which data flows."""

from __future__ import annotations

from bessemer.core.stage import StageSpec
from bessemer.pipeline.data_stages import DATA_SPECS
from bessemer.pipeline.model_stages import MODEL_SPECS

#: Every stage by its key in a recipe.
STAGES: dict[str, StageSpec] = {spec.name: spec for spec in (*DATA_SPECS, *MODEL_SPECS)}

#: The stages that make documents: those of the funnel.
DATA_STAGES = tuple(spec.name for spec in DATA_SPECS if "documents" in spec.makes)
