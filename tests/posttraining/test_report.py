"""The section of fine-tuning: answers from the run's evaluation."""

import json

from bessemer.core.report import Answers, Heading, RunReport, StageReport
from bessemer.posttraining.sft.report import report


def test_answers_are_those_of_this_stage_and_held_out_ones_come_first(tmp_path):
    records = [
        {
            "messages": [{"role": "user", "content": f"{chosen} {number}"}],
            "reference": "yes",
            "set": chosen,
            "answers": {model: {"text": model, "exact_match": 1.0} for model in ("pretrain", "sft")},
        }
        for chosen in ("held_in", "held_out")
        for number in range(9)
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    stages = []
    run = RunReport(name="r", folder=tmp_path, stages=stages)
    kinds = ("sft", "evaluate")
    stages += [StageReport(name=kind, kind=kind, metrics={}, folder=tmp_path, run=run) for kind in kinds]
    *_, heading, held_out, memorised, held_in = report(stages[0]).parts
    assert (heading, memorised) == (Heading("Held-out questions"), Heading("Held-in questions, memorised"))
    assert isinstance(held_out, Answers) and {answer.model for answer in held_out.answers} == {"sft"}
    assert [answer.question for answer in held_out.answers] == [f"held_out {number}" for number in range(8)]
    assert all(answer.held_in and answer.correct for answer in held_in.answers)


def test_without_an_evaluation_there_are_no_answers(tmp_path):
    stage = StageReport(name="sft", kind="sft", metrics={"steps": 3}, folder=tmp_path)
    assert not any(isinstance(part, Answers) for part in report(stage).parts)
