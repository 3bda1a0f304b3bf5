"""Tasks on an engine: scores are the engine's, and an evaluation that is stopped goes on."""

import json
from math import exp, sqrt
from statistics import stdev

import pytest

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.progress import Silent
from bessemer.core.records import json_lines
from bessemer.core.statistics import reliability
from bessemer.evaluation.comparison import compare
from bessemer.evaluation.evaluation_folder import ITEMS_FILE, RESULTS_FILE, Score, model_identity, read_evaluation
from bessemer.evaluation.task_answerers import PromptEncoder
from bessemer.evaluation.task_results import task_results
from bessemer.evaluation.tasks import engine_judge, evaluate_tasks
from bessemer.inference.engine import Engine, SamplingParams
from bessemer.tasks.config import TaskOptions
from bessemer.tasks.questions import ContinuationRequest
from bessemer.tasks.registry import read_task
from bessemer.tokenization.prompts import encode_continuations
from tests.inference.models import small_decoder, small_tokenizer
from tests.tasks.written import ANIMALS, task_of, write_task

MODEL = {"name": "small", "weights": "0"}
SUMS = [{"context": f"{number}+1=", "answer": str(number + 1)} for number in range(3)]


class Said(Silent):
    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return Engine(small_decoder("dense"), small_tokenizer(tmp_path_factory.mktemp("tasks")))


def evaluated(engine, tasks, out, progress=None):
    results = evaluate_tasks(engine, tasks, out, model=MODEL, progress=progress or Silent())
    assert json.loads((out / RESULTS_FILE).read_text(encoding="utf-8")) == results
    return results["tasks"], json_lines((out / ITEMS_FILE).read_text(encoding="utf-8"))


def test_the_lines_are_the_engines_own_scores(engine, tmp_path):
    task = task_of(tmp_path, ANIMALS, kind="choice", joiner="\nA: ", unconditional="A:", form="best", score="raw", shots=1)
    results, lines = evaluated(engine, [task], tmp_path / "out")
    for question, line in zip(task.questions(), lines, strict=True):
        scores = [engine.score(part.context, part.continuations) for part in question.parts]
        totals = [score.total for score in scores[0]]
        assert line["log_likelihoods"] == [pytest.approx([score.total for score in each], abs=1e-4) for each in scores]
        assert (
            line["chosen"] == totals.index(max(totals))
            and line["gold"] == ANIMALS[question.item]["gold"]
            and line["score"] == line["scores"]["raw"]
        )
        assert line["scores"]["raw"] == (line["chosen"] == line["gold"])
        assert (line["task"], line["id"]) == (f"task ({question.form})", str(question.item + 1))
    by_form = {form: [line["scores"]["raw"] for line in lines if line["form"] == form] for form in ("cloze", "letters")}
    accuracies = {form: sum(right) / 3 for form, right in by_form.items()}
    of_task = results["task"]
    assert of_task["accuracy"] == max(accuracies.values()) and of_task["form"] == max(accuracies, key=accuracies.get)
    assert of_task["standard_error"] == pytest.approx(stdev(by_form[of_task["form"]]) / sqrt(3))


def test_examples_are_computed_once(engine, tmp_path):
    rows = [{"context": f"{number} and {number} is", "continuation": f" {2 * number}"} for number in range(15)]
    write_task(tmp_path, rows[8:], name="shown", kind="cloze")
    task = task_of(tmp_path, rows[:8], kind="cloze", joiner="", shots=7, example_delimiter="\n", examples="shown.jsonl")
    before = engine.statistics.computed_tokens
    _, lines = evaluated(engine, [task], tmp_path / "out")
    asked = [len(engine.tokenizer.encode(question.parts[0].context)) for question in task.questions()]
    computed = engine.statistics.computed_tokens - before
    assert computed == sum(asked) - sum(line["cached_tokens"] for line in lines) + sum(
        line["tokens"][0][0] - 1 for line in lines
    )
    assert computed < sum(asked) / 2


def test_an_evaluation_that_was_stopped_goes_on(engine, tmp_path, monkeypatch):
    path, out = write_task(tmp_path, SUMS, kind="generate", answers=["answer"], max_tokens=4), tmp_path / "out"
    whole, lines = evaluated(engine, [read_task(path)], tmp_path / "whole")
    monkeypatch.setattr("bessemer.evaluation.task_answerers._QUESTIONS_AT_ONCE", 1)
    generate, asked = engine.generate, []

    def stopped(prompts, params):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.extend(prompts)
        return generate(prompts, params)

    monkeypatch.setattr(engine, "generate", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate_tasks(engine, [read_task(path)], out, model=MODEL, progress=Silent())
    # and a line that was being written
    with (out / ITEMS_FILE).open("a", encoding="utf-8") as stream:
        stream.write('{"task": "task", "form": "gen')
    monkeypatch.setattr(engine, "generate", lambda *given: asked.extend(given[0]) or generate(*given))
    assert evaluated(engine, [read_task(path)], out)[0] == whole
    assert len(asked) == 3
    assert [line["texts"] for line in evaluated(engine, [read_task(path)], out)[1]] == [line["texts"] for line in lines]
    assert len(asked) == 3, "nothing is left to ask"


def test_other_settings_other_items_and_another_model_are_refused(engine, tmp_path):
    path, out = write_task(tmp_path, ANIMALS, kind="choice"), tmp_path / "out"
    evaluated(engine, [read_task(path)], out)
    before = (out / ITEMS_FILE).read_bytes()
    with pytest.raises(ConfigError, match="holds task with shots 0, not 1; name another with --out"):
        evaluated(engine, [read_task(path, TaskOptions(shots=1))], out)
    with pytest.raises(ConfigError, match="holds an evaluation of weights '0', not '1'"):
        evaluate_tasks(engine, [read_task(path)], out, model={**MODEL, "weights": "1"}, progress=Silent())
    write_task(tmp_path, [*ANIMALS[:2], {**ANIMALS[2], "query": "Who moos?"}], kind="choice")
    with pytest.raises(ConfigError, match="holds task with other items"):
        evaluated(engine, [read_task(path)], out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    with pytest.raises(ConfigError, match="holds something other than an evaluation"):
        evaluated(engine, [read_task(path)], tmp_path / "full")
    assert (out / ITEMS_FILE).read_bytes() == before
    # another task beside it is welcome
    results, _ = evaluated(engine, [task_of(tmp_path, ANIMALS, kind="choice", name="another", form="letters")], out)
    assert list(results) == ["another"]


def test_a_context_that_is_too_long_is_cut_from_the_left_and_counted(engine, tmp_path):
    longest = engine.context_length
    rows = [
        {"query": "x" * (longest + 40) + "end", "choices": [" a", " bcd"], "gold": 0},
        {**ANIMALS[0], "choices": ["a", "b"]},
    ]
    said = Said()
    results, lines = evaluated(engine, [task_of(tmp_path, rows, kind="choice", joiner="")], tmp_path / "out", said)
    ids, continuations = encode_continuations(engine.tokenizer, rows[0]["query"], rows[0]["choices"])
    kept = longest + 1 - max(map(len, continuations))
    begin = list(engine.tokenizer.begin_ids)
    cut = [*begin, *ids[len(ids) - kept + len(begin) :]]
    expected = [score.total for score in engine.score(cut, continuations)]
    assert lines[0]["log_likelihoods"][0] == pytest.approx(expected, abs=1e-4)
    assert [line["cut"] for line in lines] == [len(ids) - kept, 0]
    assert (results["task"]["cut"], results["task"]["cut_tokens"]) == (1, len(ids) - kept)
    assert any(f"1 questions were too long, {len(ids) - kept} tokens cut from the left" in line for line in said.lines)


def test_samples_depend_on_the_item_and_the_seed_alone(engine, tmp_path):
    def texts(name, options):
        # the last item is the first again
        task = task_of(tmp_path, [*SUMS, SUMS[0]], options, kind="generate", max_tokens=6, samples=3)
        return [line["texts"] for line in evaluated(engine, [task], tmp_path / name)[1]]

    all_items = texts("all", TaskOptions())
    assert texts("some", TaskOptions(limit=2)) == all_items[:2]
    assert texts("seeded", TaskOptions(seed=9)) != all_items
    assert all(len(set(samples)) > 1 for samples in all_items) and all_items[0] != all_items[-1]


def test_a_model_that_answers_nothing_is_wrong_and_shown(engine, tmp_path, monkeypatch):
    end = engine.tokenizer.eos_ids[0]
    generate = engine.generate
    silent = lambda prompts, params: generate(prompts, SamplingParams(allowed_tokens=[end], temperature=0))  # noqa: E731
    monkeypatch.setattr(engine, "generate", silent)
    said = Said()
    task = task_of(tmp_path, SUMS, kind="generate", verifier="numeric")
    results, _ = evaluated(engine, [task], tmp_path / "out", said)
    assert (results["task"]["accuracy"], results["task"]["empty"]) == (0, 3)
    assert "  task: 3 of 3 answers are empty, and count as wrong" in said.lines


def test_the_beginning_of_prompts_is_said_once_for_each_task(engine, tmp_path):
    said = Said()
    task = task_of(tmp_path, ANIMALS, kind="choice")
    evaluated(engine, [task], tmp_path / "out", said)
    begins = [line for line in said.lines if "prompts begin with" in line]
    first = [repr(engine.tokenizer.decode([id], skip_special=False)) for id in engine.tokenizer.encode(ANIMALS[0]["query"])[:5]]
    assert len(begins) == 1 and " ".join(first) in begins[0]


def test_a_begin_token_that_is_not_there_or_twice_is_said(engine):
    encoder = PromptEncoder(engine.tokenizer, engine.context_length)
    bos, a = engine.tokenizer.bos_id, engine.tokenizer.encode("a", add_bos=False)[0]
    assert encoder.beginning([a]).endswith("(no begin token)")
    assert encoder.beginning([bos, bos, a]).endswith("(the begin token twice)")
    assert encoder.beginning([bos, a]) == "'<|endoftext|>' 'a'"


def test_a_continuation_that_shares_a_token_with_its_context_is_scored_whole(engine):
    tokenizer = engine.tokenizer
    assert len(tokenizer.encode("the", add_bos=False)) == 1
    part = PromptEncoder(tokenizer, engine.context_length).part(ContinuationRequest("in t", ("he", "o")))
    assert [tokenizer.decode(ids) for ids in part.continuations] == ["he", "o"]
    assert tokenizer.decode(part.context) == "in t"


def test_a_begin_token_may_be_asked_for(engine):
    tokenizer = engine.tokenizer
    encoder = PromptEncoder(tokenizer, 8, begin_token=True)
    ids = tokenizer.encode("abc", add_bos=False)
    assert (
        encoder.part(ContinuationRequest("abc", ("d",))).context == encoder.prompt("abc", 1).context == [tokenizer.bos_id, *ids]
    )
    assert encoder.part(ContinuationRequest("", ("d",))).context == [tokenizer.bos_id]
    cut = encoder.prompt("abcdefghijkl", 1)
    assert cut.context == [tokenizer.bos_id, *tokenizer.encode("abcdefghijkl", add_bos=False)[-6:]]


def test_a_conversation_is_asked_by_the_chat_template(engine, tmp_path):
    messages = ({"role": "user", "content": "Which?"},)
    encoded = PromptEncoder(engine.tokenizer, engine.context_length).part(ContinuationRequest(messages, ("a cat", "b")))
    assert encoded.context == engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert encoded.continuations == [engine.tokenizer.encode(text, add_bos=False) for text in ("a cat", "b")]


def test_of_several_forms_the_better_one_counts(tmp_path):
    def line(form, item, right):
        return {"form": form, "id": str(item), "cluster": None, "cut": 0, "cached_tokens": 0, "scores": {"raw": right}}

    task = task_of(tmp_path, ANIMALS, kind="choice", form="best", score="raw")
    lines = [line("cloze", item, 0.0) for item in range(3)] + [line("letters", item, float(item > 0)) for item in range(3)]
    results = task_results(task, lines)
    assert (results["form"], results["accuracy"], results["n"]) == ("letters", pytest.approx(2 / 3), 3)
    assert results["forms"]["cloze"]["accuracy"] == 0


def test_items_that_share_a_passage_are_a_cluster(engine, tmp_path):
    rows = [{**ANIMALS[number % 3], "passage": f"p{number // 3}", "name": f"item {number}"} for number in range(6)]
    path = write_task(tmp_path, rows, kind="choice", score="raw", cluster="passage", id="name")
    results, lines = evaluated(engine, [read_task(path)], tmp_path / "out")
    assert [(line["id"], line["cluster"]) for line in lines] == [(row["name"], row["passage"]) for row in rows]
    scores = [line["score"] for line in lines]
    # both passages ask the same: their means are equal, and items alone would say otherwise
    assert scores[:3] == scores[3:] and results["task"]["standard_error"] == pytest.approx(0, abs=1e-9)
    (one,) = read_evaluation(tmp_path / "out").tasks.values()
    assert one == {row["name"]: Score(score, row["passage"]) for row, score in zip(rows, scores, strict=True)}
    with pytest.raises(ArtefactError, match=r"task.jsonl:2: an item before it has the name 'a' too"):
        task_of(tmp_path, [{**ANIMALS[0], "name": "a"}] * 2, kind="choice", id="name")


def test_an_evaluation_can_be_compared_with_another(engine, tmp_path):
    tasks = [task_of(tmp_path, ANIMALS, kind="choice", form="best", name="animals"), task_of(tmp_path, SUMS, kind="generate")]
    for name in ("first", "second"):
        evaluated(engine, tasks, tmp_path / name)
    compared = compare(*(read_evaluation(tmp_path / name) for name in ("first", "second")))
    assert [(task.task, task.difference.items) for task in compared.tasks] == [
        ("animals (cloze)", 3),
        ("animals (letters)", 3),
        ("task", 3),
    ]
    assert compared.overall.mean == 0 and not compared.one_sided


def test_a_model_is_known_by_what_its_files_hold(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model.safetensors").write_bytes(b"weights")
    first = model_identity(tmp_path / "a", "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert model_identity(tmp_path / "b", "a") == first
    (tmp_path / "b" / "model.safetensors").write_bytes(b"weighty")
    assert model_identity(tmp_path / "b", "a")["weights"] != first["weights"]


# -- what tasks of other kinds need


def made_task(folder, name, options=None, **settings):
    path = folder / f"{name}.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items()), encoding="utf-8")
    return read_task(path, options)


def test_accuracy_is_also_given_by_length_and_a_length_that_does_not_fit_is_said(engine, tmp_path):
    said = Said()
    task = made_task(tmp_path, "needle", kind="needle", lengths=[115, 145, 4096], items=3, max_tokens=8)
    results, lines = evaluated(engine, [task], tmp_path / "out", said)
    found = results["needle"]
    assert found["by_level"]["level"] == "length" and found["cut"] == 0
    assert [(each["level"], each["n"]) for each in found["by_level"]["levels"]] == [(115, 3), (145, 3)]
    sentence = f"left out, since the model's context is {engine.context_length} tokens: length 4,096"
    assert found["left_out"] == [sentence] and f"  needle: {sentence}" in said.lines
    for line in lines:
        assert line["level"] - 40 < len(engine.tokenizer.encode(line["prompt"])) <= line["level"]
    with pytest.raises(ConfigError, match="no length fits"):
        evaluated(engine, [made_task(tmp_path, "long", kind="needle", lengths=[4096])], tmp_path / "long")


def test_instructions_are_counted_and_not_prompts(engine, tmp_path, monkeypatch):
    rows = [
        {"prompt": "a", "constraints": [{"kind": "no_commas"}]},
        {"prompt": "b", "constraints": [{"kind": "upper_case"}, {"kind": "quoted"}, {"kind": "title"}]},
    ]
    task = task_of(tmp_path, rows, kind="constraints", max_tokens=4)
    monkeypatch.setattr(type(task), "judge_all", lambda self, answered: [self.judge(one, ["fine"]) for one, _ in answered])
    results, _ = evaluated(engine, [task], tmp_path / "out")
    scores = results["task"]["scores"]
    assert (scores["prompt_level_strict_acc"]["mean"], scores["inst_level_strict_acc"]["mean"]) == (0.5, 0.25)
    # residuals 3/4 and −3/4 of the two prompts: √(2/1 · (9/16 + 9/16)) / 4
    assert scores["inst_level_strict_acc"]["standard_error"] == pytest.approx(sqrt(2 * 18 / 16) / 4)


def test_what_a_judge_did_not_say_is_left_out_of_the_mean_and_said(engine, tmp_path):
    task = task_of(
        tmp_path, [{"prompt": str(number)} for number in range(4)], kind="judged", judge={"model": "?"}, max_tokens=2
    )
    task.connect(lambda prompts: [f"Rating: {4 + number}" if number < 2 else "?" for number in range(len(prompts))])
    said = Said()
    results, lines = evaluated(engine, [task], tmp_path / "out", said)
    assert results["task"]["accuracy"] == 0.875 and [line["score"] for line in lines] == [0.75, 1, None, None]
    assert "  task: judgements that could not be read: 2" in said.lines
    assert len(read_evaluation(tmp_path / "out").tasks["task"]) == 2
    task.connect(lambda prompts: [""] * len(prompts))
    assert evaluated(engine, [task], tmp_path / "none")[0]["task"]["accuracy"] is None


def test_an_engine_may_judge(engine, tmp_path):
    ask = engine_judge(engine, max_tokens=3)
    answers = ask(["good?", "x" * 2000])
    prompt = engine.tokenizer.apply_chat_template([{"role": "user", "content": "good?"}], add_generation_prompt=True)
    (alone,) = engine.generate([prompt], SamplingParams(max_tokens=3, temperature=0))
    assert answers == [alone.text, ""]


def test_choices_have_a_calibration(engine, tmp_path):
    task = task_of(tmp_path, ANIMALS, kind="choice", joiner="\nA: ", score="characters")
    results, lines = evaluated(engine, [task], tmp_path / "out")
    confidences = [
        1 / sum(exp(value - max(values)) for value in values) for (values,) in (line["log_likelihoods"] for line in lines)
    ]
    expected = reliability(confidences, [line["scores"]["raw"] for line in lines])
    calibration = results["task"]["calibration"]
    assert calibration["expected_calibration_error"] == pytest.approx(expected.expected_calibration_error)
    assert sum(each["n"] for each in calibration["bins"]) == 3
