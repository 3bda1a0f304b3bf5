"""How a run cleaned and selected its documents, from the recipe that it wrote down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bessemer.data.config import CleanConfig, SelectConfig
from bessemer.pipeline.recipe import refuse_code
from bessemer.pipeline.run_folder import RunFolder


def recorded_cleaning(run: RunFolder, *, allow_code: bool = False) -> tuple[CleanConfig | None, SelectConfig | None, Path]:
    """The settings of the run's `clean` and `select`, None where it has none, and the folder that their paths start from.

    Raises ArtefactError for a folder that is no run's, ConfigError for settings that name code of their own without the leave.
    """
    sections = {_kind(name, section): section for name, section in run.record()["recipe"].items()}
    clean = CleanConfig.parse(_own_settings(sections["clean"]), "clean") if "clean" in sections else None
    if clean is not None and not allow_code:
        refuse_code(clean, f"{run.folder / 'run.json'}: clean")
    select = SelectConfig.parse(_own_settings(sections["select"]), "select") if "select" in sections else None
    return clean, select, Path.cwd()


def _kind(name: str, section: Any) -> str:
    return str(section.get("kind", name)) if isinstance(section, dict) else name


def _own_settings(section: Any) -> Any:
    """A stage's section without the keys that are not its settings."""
    if not isinstance(section, dict):
        return section
    return {key: value for key, value in section.items() if key not in ("from", "kind")}
