"""Published questions about pictures, in every form in which they are published."""

import json

import pytest

from bessemer.core.errors import ArtefactError, BessemerError, ConfigError
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.posttraining.data.picture_encoding import picture_of
from bessemer.tasks.config import TaskOptions
from bessemer.tasks.picture_files import StoredPicture
from bessemer.tasks.questions import task_identity
from bessemer.tasks.registry import find_tasks, read_task
from tests.cli.test_main import bessemer, one_error
from tests.model.picture_files import drawn, encoded, png_header, write_picture_model
from tests.tasks.published_pictures import (
    FORMS,
    PICTURES,
    chart_json,
    chart_other_parquet,
    chart_parquet,
    doc_json,
    doc_parquet,
    in_struct,
    mmmu_row,
    pope_json,
    pope_parquet,
    write_json,
    write_mmmu,
    write_parquet,
)


def task_of(name, data, **options):
    (task,) = find_tasks([name], TaskOptions(data=data, **options))
    return task


def shown(question):
    """A question as a text, each picture as the width of what its file holds."""
    (message,) = question.context
    return "".join(
        part["text"] if part["type"] == "text" else f"[{picture_of(part['image'], None).width}]" for part in message["content"]
    )


def test_mmmu_shows_pictures_in_their_places_and_lists_options(tmp_path):
    task = task_of("mmmu", write_mmmu(tmp_path))
    texts = [shown(question) for question in task.questions()]
    listed = "\n\n(A) a pear\n(B) a plum\n(C) a man's hat\n\nAnswer with the option's letter from the given choices directly."
    assert texts == [
        f"[50] Which of these is it?{listed}",
        f"How does [60] differ from [70]?{listed}",
        "[70]How many?\n\nAnswer the question using a single word or phrase.",
        f"[50] Which of these is it?{listed}",
    ]
    assert [question.id for question in task.questions()][-1] == "validation_Art_Theory_1"
    # three with three options, one open
    assert task.chance == pytest.approx(1 / 4)


def test_mmmu_scores_by_subject_and_an_unread_answer_as_a_guess(tmp_path):
    task = task_of("mmmu", write_mmmu(tmp_path))
    first, _, open_one, last = task.questions()
    assert task.judge(first, ["(B)"]).scores == {"accuracy": 1, "accuracy_Art": 1}
    assert task.judge(open_one, ["It is twelve"]).scores == {"accuracy": 1, "accuracy_Art": 1}
    unread = task.judge(last, ["?"])
    assert unread.scores == {"accuracy": pytest.approx(1 / 3), "accuracy_Art_Theory": pytest.approx(1 / 3)}
    assert (unread.counts, unread.chosen) == ({"unread": 1}, [None])


def test_mmmu_asks_the_subjects_that_are_named(tmp_path):
    write_mmmu(tmp_path)
    path = tmp_path / "theory.yaml"
    path.write_text('kind: mmmu\ndata: "**/*.parquet"\nsubjects: [Art_Theory]\n', encoding="utf-8")
    assert [question.id for question in read_task(path).questions()] == ["validation_Art_Theory_1"]


@pytest.mark.parametrize("write", [chart_parquet, chart_other_parquet, chart_json])
def test_charts_are_asked_alike_in_every_form(tmp_path, write):
    task = task_of("chartqa", write(tmp_path))
    questions = sorted(task.questions(), key=shown)
    asked = [f"[{40 + 10 * n}]Which is {n}?\nAnswer the question with a single word." for n in range(3)]
    assert [shown(question) for question in questions] == asked
    assert task.judge(questions[0], ["14.2"]).scores == {"relaxed_accuracy": 1, "relaxed_accuracy_human": 1}
    assert task.judge(questions[2], ["0.6"]).scores == {"relaxed_accuracy": 0, "relaxed_accuracy_augmented": 0}
    assert task.headline("generate") == "relaxed_accuracy"


@pytest.mark.parametrize("write", [doc_json, doc_parquet])
def test_pages_are_asked_alike_in_every_form(tmp_path, write):
    task = task_of("docvqa", write(tmp_path))
    first, second = task.questions()
    assert shown(first) == "[40]Where is 0?\nAnswer the question using a single word or phrase."
    assert (first.id, second.id) == ("300", "301")
    assert task.judge(first, ["denver"]).scores == {"anls": 1, "anls_layout": 1}
    partly = pytest.approx(7 / 8)
    assert task.judge(second, ["12/15/89"]).scores == {"anls": partly, "anls_form": partly, "anls_table/list": partly}


def test_pope_scores_by_category(tmp_path):
    task = task_of("pope", pope_json(tmp_path))
    questions = {question.id: question for question in task.questions()}
    assert len(questions) == 12
    there = questions["popular/1"]
    assert shown(there) == "[40]Is there a cat in the image?\nAnswer the question using a single word or phrase."
    names = ["accuracy", "yes_ratio", "precision", "recall", "f1"]
    outcome = task.judge(there, ["Yes, there is."])
    assert outcome.scores == dict.fromkeys([*names, *(f"{name}_popular" for name in names)], 1.0)
    assert outcome.weights["f1_popular"] == 2
    missed = task.judge(questions["random/3"], ["no"])
    assert "precision_random" not in missed.scores and missed.scores["f1_random"] == 0
    # the questions of a picture are not independent
    assert there.cluster == questions["random/3"].cluster != questions["random/2"].cluster


def test_pope_is_asked_of_parquet_too(tmp_path):
    assert [question.id for question in task_of("pope", pope_parquet(tmp_path)).questions()] == [
        "random/0",
        "popular/1",
        "adversarial/2",
    ]


def test_data_may_be_the_file_itself(tmp_path):
    write_mmmu(tmp_path)
    (file,) = (tmp_path / "Art_Theory").iterdir()
    assert len(task_of("mmmu", file).questions()) == 1
    assert len(task_of("mmmu", tmp_path, limit=2).questions()) == 2


def test_pictures_are_known_by_their_content_and_not_kept(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    tasks = [task_of("docvqa", doc_json(here)), task_of("docvqa", doc_json(there))]
    assert task_identity(tasks[0], tasks[0].questions()) == task_identity(tasks[1], tasks[1].questions())
    picture = tasks[0].questions()[0].context[0]["content"][0]["image"]
    assert isinstance(picture, StoredPicture) and json.dumps(picture).startswith('"sha256:') and len(picture) == 71
    (there / "documents" / "xnbl0037_1.png").write_bytes(PICTURES[3])
    other = task_of("docvqa", there)
    assert task_identity(other, other.questions()) != task_identity(tasks[0], tasks[0].questions())


def test_several_groups_of_rows_are_read_one_by_one(tmp_path):
    rows = [mmmu_row("Art", n, image_1=in_struct(encoded(drawn(20 + n, 20)))) for n in range(7)]
    task = task_of("mmmu", write_parquet(tmp_path / "validation-0.parquet", rows, rows_a_group=3))
    assert [shown(question)[:4] for question in task.questions()] == [f"[{20 + n}]" for n in range(7)]


# -- what does not fit


def without(name):
    return {key: value for key, value in mmmu_row().items() if key != name}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (without("question"), "row 0: has no field 'question'"),
        (without("image_1"), "row 0: has no field 'image_1'"),
        (without("answer"), "row 0: has no field 'answer'"),
        (mmmu_row(answer="?"), "row 0: its answer is withheld"),
        (mmmu_row(answer="E"), "row 0: 'answer' is 'E', and the options are A, B, C"),
        (mmmu_row(options="['a', "), "row 0: 'options' is .* no list as Python writes it"),
        (mmmu_row(options="[__import__('os')]"), "no list as Python writes it"),
        (mmmu_row(image_1=in_struct(b"")), "row 0, image_1: its picture is no picture that is read"),
        (mmmu_row(image_1={"bytes": None, "path": "a.png"}), "row 0: 'image_1' holds no bytes of a picture"),
        (mmmu_row(image_1=in_struct(png_header(60_000, 1))), "row 0, image_1: its picture is 60,000 × 1 pixels"),
        (mmmu_row(image_1=in_struct(png_header(60_000, 60_000))), "row 0, image_1: its picture has "),
        (mmmu_row(image_1=in_struct(encoded(drawn(9, 9, mode="CMYK"), "JPEG"))), r"\(CMYK\)"),
    ],
)
def test_a_row_that_does_not_fit_is_one_line(tmp_path, row, message):
    write_parquet(tmp_path / "validation-0.parquet", [row])
    with pytest.raises(ArtefactError, match=message) as error:
        task_of("mmmu", tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("../secret.png", "leads out of"),
        ("/etc/secret.png", "leads out of"),
        ("..\\secret.png", "leads out of"),
        ("C:\\secret.png", "leads out of"),
        ("https://example.org/a.png", "nothing is fetched"),
        ("file:///etc/a.png", "nothing is fetched"),
        ("none.png", "there is no picture 'none.png' in .*; say with `images` where they lie"),
    ],
)
def test_a_path_outward_or_to_nothing_is_one_line(tmp_path, image, message):
    (tmp_path / "secret.png").write_bytes(PICTURES[0])
    folder = tmp_path / "pope"
    folder.mkdir()
    row = {"question_id": 1, "image": image, "text": "Is there a cat in the image?", "label": "yes"}
    write_json(folder / "coco_pope_random.json", [row, row | {"question_id": 2}], lines=True)
    with pytest.raises(ArtefactError, match=message) as error:
        task_of("pope", folder)
    assert "coco_pope_random.json" in str(error.value) and "\n" not in str(error.value)


def test_a_picture_of_two_folders_is_asked_for(tmp_path):
    pope_json(tmp_path)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "COCO_val2014_000000000000.png").write_bytes(PICTURES[2])
    with pytest.raises(ArtefactError, match="say with `images` which folder"):
        task_of("pope", tmp_path)
    path = tmp_path / "pope.yaml"
    path.write_text('kind: pope\ndata: "coco/*.json"\nimages: val2014\n', encoding="utf-8")
    assert len(read_task(path).questions()) == 12
    path.write_text('kind: pope\ndata: "coco/*.json"\nimages: none\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="there is no folder none"):
        read_task(path)


def test_no_file_and_files_of_two_data_sets_are_one_line(tmp_path):
    with pytest.raises(ArtefactError, match=r"there is no \*\*/val_\*.json or .*--data FILE or FOLDER"):
        task_of("docvqa", tmp_path)
    doc_json(tmp_path / "one")
    doc_json(tmp_path / "two")
    with pytest.raises(ArtefactError, match="name one of them with --data"):
        task_of("docvqa", tmp_path)
    (tmp_path / "validation-0.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ArtefactError, match="is not Parquet, or damaged"):
        task_of("mmmu", tmp_path)


# -- a model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_picture_model(folder)
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_a_model_is_evaluated_on_every_form(tmp_path, model, form, capsys, monkeypatch):
    name, write = FORMS[form]
    monkeypatch.chdir(tmp_path)
    data = write(tmp_path / "data")
    code, _, err = bessemer(capsys, "evaluate", model, "--tasks", name, "--data", data, "--device", "cpu", "--out", "out")
    assert code == 0, err
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["tasks"][name]
    task = task_of(name, data)
    assert results["n"] == len(task.questions()) and results["score"] == task.headline("generate")
    lines = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text(encoding="utf-8").splitlines()]
    engine = Engine(model, device="cpu", config=EngineConfig(kv_memory=0.01))
    first = task.questions()[0]
    prompt = [
        part if part["type"] == "text" else {"type": "image", "image": part["image"].read()}
        for part in first.context[0]["content"]
    ]
    wanted = engine.chat(
        [{"role": "user", "content": prompt}], SamplingParams(max_tokens=task.generation.max_tokens, temperature=0.0)
    )
    assert lines[0]["texts"] == [wanted.text] and "sha256:" in lines[0]["prompt"]


def test_bad_data_ends_the_command_with_one_line(tmp_path, model, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_parquet(tmp_path / "validation-0.parquet", [without("question")])
    code, _, err = bessemer(capsys, "evaluate", model, "--tasks", "mmmu", "--data", tmp_path, "--device", "cpu")
    assert code == 2 and "has no field 'question'" in one_error(err)


def test_a_picture_that_is_cut_off_names_its_row(tmp_path):
    data = encoded(drawn(60, 60))
    task = task_of(
        "mmmu", write_parquet(tmp_path / "validation-0.parquet", [mmmu_row(image_1=in_struct(data[: len(data) // 2]))])
    )
    with pytest.raises(BessemerError, match="row 0, image_1: its picture is damaged or cut off"):
        shown(task.questions()[0])
