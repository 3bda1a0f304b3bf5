"""A real model on real items: our tasks, the harness with our adapter and with `transformers`, and the harness over HTTP."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from evaluation_agreement import MOST_NATS, TASKS, agrees, compared, through_all_doors
from evaluation_tasks import DATA, Subject, float32_folder, server

pytestmark = [
    pytest.mark.peer(name="lm-eval"),
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason="the data of the tasks lies beside the repository"),
]

ITEMS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return float32_folder(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def engine(folder):
    from bessemer.inference.engine import Engine

    return Engine(folder)


@pytest.fixture(scope="module")
def address(folder):
    with server(folder) as address:
        yield address


@pytest.mark.parametrize("task", TASKS)
def test_all_doors_give_the_same_items_the_same_log_likelihoods(task, folder, engine, address, tmp_path):
    runs = through_all_doors(Subject.of(task, tmp_path / "data", ITEMS), folder, engine, address, tmp_path / "out")
    found = compared(runs)
    assert found["items"] == ITEMS and all(len(run.log_likelihoods) == ITEMS for run in runs.values())
    assert agrees(found), found


def test_examples_before_a_question_are_the_same_on_both_sides(folder, engine, tmp_path):
    from bessemer.evaluation.lm_eval_model import BessemerLM

    subject = Subject.of("arc_easy", tmp_path / "data", 6, shots=5)
    assert subject.run(engine, tmp_path / "out").furthest(subject.run_in_harness(BessemerLM(engine))) <= MOST_NATS


@pytest.mark.parametrize("as_ids", [True, False])
def test_answers_over_http_are_the_engines(folder, engine, address, tmp_path, as_ids):
    from evaluation_tasks import completions_model

    subject = Subject.of("svamp", tmp_path / "data", 6, shots=3, max_tokens=16)
    texts = subject.run(engine, tmp_path / "out").texts
    assert subject.run_in_harness(completions_model(address, folder, as_ids=as_ids, batch_size=2)).texts == texts
