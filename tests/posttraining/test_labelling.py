"""Answers sampled to be ranked, rankings as pairs, and the page on which they are made."""

import json
import re

import pytest
from fastapi.testclient import TestClient

from bessemer.core.errors import ArtefactError, SourceError
from bessemer.core.progress import Silent
from bessemer.inference.engine import Engine, SamplingParams
from bessemer.posttraining.data.examples import read_examples
from bessemer.posttraining.data.formats import as_pair
from bessemer.posttraining.labelling import (
    ANSWERS,
    PAIRS,
    RANKINGS,
    Answers,
    Labels,
    ranked_pairs,
    read_prompts,
    sample_answers,
)
from bessemer.webapp.labelling import create_label_app
from tests.posttraining.test_formats import said
from tests.training.conftest import RecordedProgress

#: Tokens at which answers of a random model end soon.
ENDS = list(range(0, 320, 8))


def answers(number, count=3):
    return {
        "id": f"id{number}",
        "messages": [said("user", f"Question <{number}>?")],
        "answers": [f"<b>{place}</b>" for place in range(count)],
    }


@pytest.fixture
def folder(tmp_path):
    (tmp_path / ANSWERS).write_text("".join(json.dumps(answers(number)) + "\n" for number in range(2)), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("ranks", "pairs"),
    [
        ([2, 1, 3, 4], [(1, 0), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]),
        ([1, 1, 2, 2], [(0, 2), (0, 3), (1, 2), (1, 3)]),
        ([1, 1, 1, 1], []),
    ],
)
def test_a_ranking_is_its_pairs_which_together_weigh_one(ranks, pairs):
    made = ranked_pairs(Answers("a", [said("user", "Q?")], ["0", "1", "2", "3"]), ranks)
    assert [(int(row["chosen"][0]["content"]), int(row["rejected"][0]["content"])) for row in made] == pairs
    assert sum(row["weight"] for row in made) == pytest.approx(1 if pairs else 0)


def test_judgements_are_kept_corrected_and_read_as_pairs(folder):
    labels = Labels(folder)
    labels.rank("id0", [1, 2, 3])
    labels.rank("id1", [])
    labels.rank("id0", [3, 1, 1])
    with pytest.raises(ValueError, match=r"3 answers need as many ranks from 1 to 3, not \[1, 2\]"):
        labels.rank("id0", [1, 2])
    again = Labels(folder)
    assert not again.left and again.rankings["id0"].ranks == [3, 1, 1]
    pairs = read_examples(folder / PAIRS, as_pair)
    assert [(pair.chosen[0]["content"], pair.rejected[0]["content"], pair.weight) for pair in pairs] == [
        ("<b>1</b>", "<b>0</b>", 0.5),
        ("<b>2</b>", "<b>0</b>", 0.5),
    ]
    # a line cut off by a crash is left out, one that is damaged is not
    with (folder / RANKINGS).open("a", encoding="utf-8") as stream:
        stream.write('{"id": "id1", "ra')
    assert len(Labels(folder).rankings) == 2
    with (folder / RANKINGS).open("a", encoding="utf-8") as stream:
        stream.write("\n")
    with pytest.raises(ArtefactError, match=r"rankings.jsonl:4: not a line of labels; it needs id, ranks"):
        Labels(folder)


def test_a_judgement_that_a_crash_cut_off_harms_no_other(folder):
    Labels(folder).rank("id0", [1, 2, 3])
    with (folder / RANKINGS).open("a", encoding="utf-8") as stream:
        stream.write('{"id": "id1", "ra')
    Labels(folder).rank("id1", [2, 1, 3])
    assert {id: one.ranks for id, one in Labels(folder).rankings.items()} == {"id0": [1, 2, 3], "id1": [2, 1, 3]}


def test_the_page_shows_one_prompt_at_a_time_and_takes_only_its_own_forms(folder):
    client = TestClient(create_label_app(Labels(folder), folder), base_url="http://localhost:8001")
    page = client.get("/").text
    assert (
        "0 of 2 prompts judged" in page
        and "Question &lt;0&gt;?" in page
        and "&lt;b&gt;2&lt;/b&gt;" in page
        and "<b>2</b>" not in page
    )
    token = re.search(r'name="token" value="([^"]+)"', page)[1]
    form = {"token": token, "id": "id0", "do": "rank", "rank0": "2", "rank1": "1", "rank2": "3"}
    for other in ("another", "é"):
        assert client.post("/", data=form | {"token": other}).status_code == 403
    # Python reads no whole number of more than 4,300 digits
    for rank in ("1" * 4400, "²"):
        assert client.post("/", data=form | {"rank1": rank}).status_code == 400
    refused = client.post("/", data=form | {"rank2": ""})
    assert refused.status_code == 400 and "Give every answer a rank" in refused.text
    after = client.post("/", data=form)
    assert after.status_code == 200 and "1 of 2 prompts judged · 3 pairs" in after.text and "Question &lt;1&gt;?" in after.text
    # the last one again, and the other is skipped
    assert "Question &lt;0&gt;?" in client.post("/", data={"token": token, "id": "id1", "do": "back"}).text
    client.post("/", data=form | {"rank0": "1"})
    assert "All are judged" in client.post("/", data={"token": token, "id": "id1", "do": "skip"}).text
    assert Labels(folder).rankings["id0"].ranks == [1, 1, 3] and Labels(folder).rankings["id1"].ranks == []


def test_the_page_answers_to_no_name_that_was_pointed_at_this_machine(folder):
    def asked(app, host, **headers):
        return TestClient(app, base_url="http://localhost").get("/", headers={"Host": host} | headers).status_code

    app = create_label_app(Labels(folder), folder)
    assert [asked(app, host) for host in ("localhost:8001", "127.0.0.1:8001", "attacker.example:8001")] == [200, 200, 403]
    assert asked(app, "localhost:8001", Origin="http://attacker.example") == 403
    assert asked(create_label_app(Labels(folder), folder, ["labels.example"]), "labels.example") == 200


@pytest.mark.usefixtures("one_thread")
def test_answers_differ_and_are_not_sampled_twice(model_folder, tmp_path):
    prompts = [(said("user", f"Question {number}?"),) for number in range(3)]
    engine = Engine(model_folder, device="cpu")
    asked = {"count": 3, "params": SamplingParams(max_tokens=40, stop_token_ids=ENDS), "seed": 1, "progress": Silent()}
    first = sample_answers(engine, prompts[:2], tmp_path, **asked)
    assert all(len(set(one.answers)) == 3 for one in first.answers.values())
    before = (tmp_path / ANSWERS).read_bytes()
    second = sample_answers(engine, prompts, tmp_path, **asked)
    assert len(second.answers) == 3 and (tmp_path / ANSWERS).read_bytes().startswith(before)


@pytest.mark.usefixtures("one_thread")
def test_an_answer_that_was_cut_is_not_ranked(model_folder, tmp_path):
    prompts, progress = [(said("user", f"Question {number}?"),) for number in range(3)], RecordedProgress()
    engine = Engine(model_folder, device="cpu")
    asked = {"count": 3, "seed": 1, "progress": progress}
    generated, generate = [], engine.generate
    engine.generate = lambda *given: generated.append(generate(*given)) or generated[-1]
    # about half of the answers end within so many tokens
    params = SamplingParams(max_tokens=5, stop_token_ids=ENDS)
    labels = sample_answers(engine, prompts, tmp_path / "some", params=params, **asked)
    ended = {one.text.strip() for lot in generated for one in lot if one.finish_reason == "stop"}
    cut = {one.text.strip() for lot in generated for one in lot if one.finish_reason == "length"}
    kept = {text for one in labels.answers.values() for text in one.answers}
    assert kept and kept <= ended and cut - ended
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    labels = sample_answers(engine, prompts, tmp_path / "none", params=params, **asked)
    line = progress.lines[-1]
    assert not labels.answers and "3 prompts are left out" in line and "--max-tokens" in line


def test_prompts_are_what_is_asked_before_the_last_answer(tmp_path):
    path = tmp_path / "p.jsonl"
    turns = [said("user", "Why?"), said("assistant", "So.")]
    path.write_text(f'{{"prompt": "Who?"}}\n{json.dumps({"messages": turns})}\n', encoding="utf-8")
    assert [prompt[-1]["content"] for prompt in read_prompts(path, 9)] == ["Who?", "Why?"]
    path.write_text('{"question": "Who?"}\n', encoding="utf-8")
    with pytest.raises(SourceError, match=r"p.jsonl:1: needs messages or a text under 'prompt'; it has 'question'"):
        read_prompts(path, 9)
