from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.data.corpus.reader import SCHEMA
from bessemer.data.corpus.writer import write_documents
from bessemer.data.plugins import Languages, MeantFor
from bessemer.data.thresholds import beside_limits


def folder_of(path, values, languages=None, language_scores=None):
    """A folder of documents with a score `mine`."""
    count = len(values)
    columns = {field.name: pa.nulls(count, field.type) for field in SCHEMA}
    columns |= {name: pa.array([name] * count) for name in ("text", "text_hash", "source", "split")}
    columns["id"] = pa.array([f"{number:032x}" for number in range(count)], pa.string())
    columns["language"] = pa.array(languages or ["en"] * count, pa.string())
    schema = SCHEMA.append(pa.field("mine", pa.float64())).append(pa.field("other", pa.float64()))
    columns |= {"mine": pa.array(values, pa.float64()), "other": pa.array([0.0] * count)}
    schema = schema.append(pa.field("language_score", pa.float64()))
    columns["language_score"] = pa.array(language_scores or [1.0] * count)
    write_documents(path, [pa.table(columns, schema=schema)], schema, buckets=1)
    return path


def test_bins_are_cut_at_inclusive_limits(tmp_path):
    folder = folder_of(tmp_path / "documents", [0.0, 0.2, 0.5, 0.5, 0.51, 1.0])
    found = beside_limits([folder], {"mine": (0.2, 0.5)}, Languages(), {"mine": {"low": 0.0, "high": 1.0}})["mine"]
    counts = dict(zip(found["edges"], found["counts"], strict=False))
    inside = sum(count for edge, count in counts.items() if 0.2 <= edge <= 0.5)
    assert inside == 3
    assert counts[0.2] == 1
    assert found["outside"] == found["alone"] == 3
    assert sum(found["counts"]) + found["below"] + found["above"] == 6


def test_a_limit_beyond_the_range_ends_a_bin_of_its_own(tmp_path):
    folder = folder_of(tmp_path / "documents", [0.0, 1.0, 5.0, 9.0, 9.5])
    found = beside_limits([folder], {"mine": (None, 9.0)}, Languages(), {"mine": {"low": 0.0, "high": 1.0}})["mine"]
    assert found["edges"][-1] == math.nextafter(9.0, math.inf)
    assert (found["counts"][-1], found["above"], found["outside"]) == (2, 1, 1)


def test_what_only_one_limit_drops_is_counted_apart(tmp_path):
    folder = folder_of(tmp_path / "documents", [0.0, 0.0, 1.0], ["en", "de", "en"])
    limits = {"mine": (0.5, None), "other": (None, 1.0)}
    found = beside_limits([folder], limits, Languages(("en",)), {})
    assert (found["mine"]["outside"], found["mine"]["alone"]) == (2, 1)
    assert (found["other"]["outside"], found["other"]["alone"]) == (0, 0)


def test_a_language_with_a_limit_of_its_own_has_a_histogram_of_its_own(tmp_path):
    tongues, scores = ["en", "en", "de", "de", "fr"], [0.6, 0.7, 0.4, 0.6, 0.9]
    folder = folder_of(tmp_path / "documents", [0.0] * 5, tongues, scores)
    found = beside_limits([folder], {}, Languages(("en", "de"), 0.65, {"de": 0.5}), {})
    figures = {name: tuple(one[key] for key in ("lowest", "documents", "outside", "alone")) for name, one in found.items()}
    assert figures == {"language_score": (0.65, 3, 1, 1), "language_score_de": (0.5, 2, 1, 1)}


def test_documents_in_languages_that_a_limit_is_not_meant_for_are_not_counted(tmp_path):
    folder = folder_of(tmp_path / "documents", [0.0, 0.0, 0.0, 1.0], ["en", "th", None, "en"])
    scope = {"mine": MeantFor(but=("th",))}
    found = beside_limits([folder], {"mine": (0.5, None)}, Languages(), {"mine": {"low": 0.0, "high": 1.0}}, scope)["mine"]
    assert (found["documents"], found["outside"], found["alone"], sum(found["counts"])) == (3, 2, 2, 3)


def test_a_score_that_is_missing_or_no_number_breaks_its_limit_and_has_no_bin(tmp_path):
    folder = folder_of(tmp_path / "documents", [None, math.nan, 0.7])
    found = beside_limits([folder], {"mine": (0.5, None)}, Languages(), {})["mine"]
    assert found["outside"] == 2
    assert sum(found["counts"]) + found["below"] + found["above"] == 1


def test_kept_and_dropped_documents_are_counted_together(tmp_path):
    folders = [folder_of(tmp_path / "documents", [0.7]), folder_of(tmp_path / "rejected", [0.1, 0.2])]
    assert beside_limits(folders, {"mine": (0.5, None)}, Languages(), {})["mine"]["outside"] == 2
    assert beside_limits(folders, {"mine": (None, None)}, Languages(), {}) == {}


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-10, 10), min_size=1, max_size=30),
    st.none() | st.floats(-12, 12),
    st.none() | st.floats(-12, 12),
)
def test_every_bin_is_wholly_kept_or_wholly_dropped(tmp_path_factory, values, lowest, highest):
    if lowest is None and highest is None:
        return
    folder = folder_of(tmp_path_factory.mktemp("documents"), values)
    found = beside_limits([folder], {"mine": (lowest, highest)}, Languages(), {"mine": {"low": -5.0, "high": 5.0}})["mine"]
    edges = np.array([-math.inf, *found["edges"], math.inf])
    counts = np.array([found["below"], *found["counts"], found["above"]])
    starts = edges[:-1]
    kept = (starts >= (-math.inf if lowest is None else lowest)) & (starts <= (math.inf if highest is None else highest))
    assert counts.sum() == len(values)
    assert counts[~kept].sum() == found["outside"]
    if lowest is not None and highest is not None and lowest > highest:
        assert found["outside"] == pytest.approx(len(values))
