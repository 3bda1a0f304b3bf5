"""Descriptions of score and count columns, in a line: for `bessemer explain`, the dataset card and readers of a corpus."""

from __future__ import annotations

from bessemer.data.thresholds.presets import declared_column


def column_description(column: str) -> str:
    """What a column says; an empty string for one that no filter or edit declares, as a user's own."""
    if column.startswith("language_score_"):
        # the documents of one language, which has a limit of its own
        return f"{column_description('language_score')}, of those in {column.rpartition('_')[2]}"
    declared = declared_column(column)
    return "" if declared is None else declared.description
