"""The report of a corpus: before and after, thresholds, copies, reasons."""

from __future__ import annotations

from pathlib import Path

from bessemer.core.report import Cell, Documents, Folded, Histogram, RunReport, StageReport, Table
from bessemer.data.report import (
    before_and_after,
    corpus_parts,
    groups_tables,
    histograms,
    reasons,
    report,
    scores_stage,
    sentences,
    stages_table,
)
from tests.views.sample_run import HOSTILE, data_stage, sample_metrics, thresholds


def counts(**documents: int) -> dict:
    return {name: {"documents": count, "bytes": 10 * count} for name, count in documents.items()}


def histogram(title: str) -> Histogram:
    return next(one for one in histograms(thresholds()) if one.title == title)


def data_stages() -> dict[str, dict]:
    return {name: metrics for name, metrics in sample_metrics().items() if "documents_out" in metrics}


def run_of(metrics: dict[str, dict]) -> list[StageReport]:
    stages: list[StageReport] = []
    run = RunReport(name="r", folder=Path(), stages=stages)
    stages += [StageReport(name=name, kind=name, metrics=found, folder=Path(), run=run) for name, found in metrics.items()]
    return stages


def texts_of(parts) -> str:
    """All words of documents, remarks, tables and folded parts."""
    return " ".join(map(repr, parts))


def test_the_last_data_stage_of_a_run_reports_the_corpus():
    stages = run_of(data_stages() | {"tokenize": {"vocab_size": 9}})
    assert [report(stage) is not None for stage in stages] == [False, False, False, True, False]
    assert [bool(sentences(stage)) for stage in stages] == [False, False, False, True, False]
    assert "bessemer explain ID --run r" in report(stages[3]).parts[-1].text


def test_what_could_not_be_read_is_counted_with_its_first_cases():
    stages = data_stages()
    stages["collect"] |= {
        "problems": {"files": {"bad_records": 1200, "files_in_other_encodings": 3}, "pdf": {"encrypted_files": 1}},
        "losses": {"files": ["a.jsonl: byte 0: no", "b.jsonl: byte 0: no"], "pdf": ["c.pdf: encrypted", "d.pdf: encrypted"]},
    }
    assert sentences(run_of(stages)[-1])[-4:] == [
        "Could not be read: bad records (1,200), encrypted files (1).",
        *("– a.jsonl: byte 0: no.", "– b.jsonl: byte 0: no.", "– c.pdf: encrypted."),
    ]
    stages["collect"] |= {"problems": {"files": {"files_in_other_encodings": 3}}, "losses": {}}
    assert not any("Could not be read" in sentence for sentence in sentences(run_of(stages)[-1]))


def test_bars_of_stages_are_shares_of_the_first_one():
    table = stages_table({"collect": data_stage(100, 100, 1000, 1000), "clean": data_stage(100, 75, 1000, 600, short=25)})
    assert [(row[1].share, row[1].rest) for row in table.rows] == [(1.0, 0.0), (0.6, 0.4)]
    assert [row[-1] for row in table.rows] == ["–", "25 (25.0 %)"]


def test_reasons_stand_in_order_of_frequency_with_their_examples():
    metrics = data_stage(100, 60, 1000, 600, rare=5, frequent=35)
    found = reasons(metrics["by_reason"], metrics["examples"]["dropped"])
    assert [one.summary[0].text for one in found] == ["Frequent", "Rare"]
    assert [one.summary[1] for one in found] == [Cell("35", share=1.0), Cell("5", share=5 / 35)]
    assert all(HOSTILE in document.reason for one in found for part in one.parts for document in part.documents)


def test_groups_are_counted_as_the_first_stage_that_knows_them_took_them_in():
    stages = {
        "collect": {"by_language": {}, "rejected_by_language": {}},
        "clean": {"by_language": counts(en=7), "rejected_by_language": counts(en=2, de=1)},
        "select": {"by_language": counts(en=4)},
    }
    english, german = before_and_after(stages, "language")
    assert (english.name, english.documents, english.kept, english.kept_bytes) == ("en", 9, 4, 40)
    assert (german.name, german.documents, german.kept) == ("de", 1, 0)


def test_a_domain_that_a_full_list_does_not_name_may_still_be_there():
    many = counts(**{f"d{number}": 5 for number in range(100)})
    stages = {"collect": {"by_domain": counts(rare=1) | many}, "select": {"by_domain": many}}
    rare = next(group for group in before_and_after(stages, "domain") if group.name == "rare")
    assert rare.kept is None
    few = {"collect": {"by_domain": counts(rare=1, d=2)}, "select": {"by_domain": counts(d=2)}}
    assert next(group for group in before_and_after(few, "domain") if group.name == "rare").kept == 0


def test_documents_that_nobody_took_in_are_no_group():
    assert before_and_after({"collect": {"by_source": {}}}, "source") == []


def test_small_groups_are_folded_away():
    stages = {"collect": {"by_source": counts(**{f"s{number}": 30 - number for number in range(15)})}}
    table, folded = groups_tables("Source", before_and_after(stages, "source"))
    assert isinstance(table, Table) and isinstance(folded, Folded)
    assert (len(table.rows), folded.summary, len(folded.parts[0].rows)) == (12, "3 more", 3)


def test_what_a_limit_does_is_said():
    assert histogram("gopher: words").effect == "at least 2: drops 13 (81.2 %), 3 for this alone"
    assert histogram("toxicity: score").effect == "at most 3: drops none"


def test_scores_of_stages_without_thresholds_are_drawn_without():
    stage, found = scores_stage({"clean": {"scores": {"a_b": {"low": 0, "high": 1, "counts": [1, 2]}}}, "dedup": {}})
    assert (stage, [one.limit for one in found], found[0].documents) == ("clean", [""], 3)


def test_clusters_show_their_sizes_and_members():
    text = texts_of(corpus_parts(data_stages()))
    for expected in ("2 to 3", "A cluster of 5", "similarity 0.87", "12 passages were cut out of 7 documents"):
        assert expected in text


def test_examples_kept_are_those_of_the_last_stage():
    *_, examples = corpus_parts(data_stages())
    assert isinstance(examples, Documents) and len(examples.documents) == 2
