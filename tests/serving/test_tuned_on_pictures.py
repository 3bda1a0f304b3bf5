"""A table with a column of pictures, through `finetune` and a server, to the answer over HTTP; and tasks with pictures."""

import base64
import csv
import json

import httpx
import numpy as np
import pytest

from bessemer.core.errors import ConfigError, RequestError
from bessemer.core.progress import Silent
from bessemer.evaluation.task_answerers import answers
from bessemer.inference.engine import Engine, EngineConfig
from bessemer.model.formats import ModelSource
from bessemer.model.storage.tuned_folder import tuned_model
from bessemer.posttraining.sft.config import FinetuneConfig
from bessemer.posttraining.sft.finetune import asked_of, finetune, finish
from bessemer.tasks.config import TaskOptions
from bessemer.tasks.drawn import ANSWERS, blank_png, drawn_items, png_of
from bessemer.tasks.registry import find_tasks
from tests.inference.models import small_decoder, small_tokenizer
from tests.model.picture_files import TILES, write_picture_model


class Recorded(Silent):
    """Keeps what is said."""

    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


SHADES = {"dark": 20, "light": 235}


def shaded(shade, seed):
    """A noisy picture of a shade, as PNG."""
    noise = np.random.default_rng(seed).integers(-15, 15, (16, 16, 3))
    return png_of((SHADES[shade] + noise).astype(np.uint8))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_picture_model(folder)
    path = folder / "preprocessor_config.json"
    # one tile a picture
    path.write_text(
        path.read_text(encoding="utf-8").replace('"do_image_splitting": true', '"do_image_splitting": false'), encoding="utf-8"
    )
    # as SmolVLM's, whose turns end so
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"eos_token": "<end_of_utterance>"}), encoding="utf-8"
    )
    assert TILES["max_image_size"]["longest_edge"] == 16
    return folder


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    with (folder / "shades.csv").open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(["image", "question", "answer"])
        for number in range(60):
            shade = list(SHADES)[number % 2]
            (folder / f"{number}.png").write_bytes(shaded(shade, number))
            rows.writerow([f"{number}.png", "dark or light?", shade])
    given = {"epochs": 8, "learning_rate": 3e-3, "general": [], "method": "full", "base_dtype": "float32", "held_out": 0.1}
    config, source, data = FinetuneConfig.parse(given, "finetune"), ModelSource("folder", str(base)), str(folder / "shades.csv")
    said = Recorded()
    result = finetune(config, source, data, folder / "out", seed=7, device="cpu", progress=said)
    finish(folder / "out", {"asked": asked_of(config, source, data, 7)})
    return folder / "out", result, said


def test_a_table_of_pictures_is_learnt(tuned):
    out, result, said = tuned
    assert result.after_N.mean() < 0.1 < result.before_N.mean()
    assert any("'image' is the picture" in line for line in said.lines)
    assert any("encoder of pictures" in line for line in said.lines)
    assert [answer["after"].strip() for answer in result.answers] == [answer["reference"] for answer in result.answers]
    assert tuned_model(out).folder == out / "model"


@pytest.mark.parametrize("shade", SHADES)
def test_a_server_says_over_http_what_was_learnt(tuned, start, shade):
    engine = Engine(tuned[0], device="cpu", config=EngineConfig(kv_memory=0.01))
    uri = f"data:image/png;base64,{base64.b64encode(shaded(shade, 1000)).decode()}"
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "dark or light?"}]
    asked = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 12, "temperature": 0}
    answer = httpx.post(start(engine) + "/v1/chat/completions", json=asked, timeout=60).json()
    assert "choices" in answer, answer
    assert answer["choices"][0]["message"]["content"].strip() == shade


def test_an_adapter_beside_pictures_is_merged(base, tuned, tmp_path):
    data = str(tuned[0].parent / "shades.csv")
    config = FinetuneConfig.parse({"method": "lora", "epochs": 0.2, "general": [], "base_dtype": "float32"}, "finetune")
    source = ModelSource("folder", str(base))
    finetune(config, source, data, tmp_path / "out", seed=7, device="cpu", progress=Recorded())
    assert (tmp_path / "out" / "model" / "config.json").is_file() and not (tmp_path / "out" / "adapter").exists()
    with pytest.raises(ConfigError, match="is tuned by full or lora"):
        finetune(
            config.with_changes(method="qlora", base_dtype="auto"),
            source,
            data,
            tmp_path / "more",
            seed=7,
            device="cpu",
            progress=Recorded(),
        )


def test_drawn_pictures_are_never_in_both_parts_and_their_answers_are_balanced():
    trained, asked = (find_tasks([name], TaskOptions(limit=300))[0] for name in ("drawn_pictures", "drawn_pictures_held_out"))
    pictures = [{question.context[-1]["content"][0]["image"] for question in task.questions()} for task in (trained, asked)]
    assert [len(each) for each in pictures] == [300, 300] and not pictures[0] & pictures[1]
    items = drawn_items(600, 3, about=["shape"])
    counts = [sum(item.answer == answer for item in items) for answer in ANSWERS["shape"]]
    assert sum(counts) == 600 and min(counts) > 80
    assert drawn_items(7, 3) == drawn_items(9, 3)[:7]


def test_a_task_shows_its_pictures_and_a_blind_one_grey(tuned):
    engine = Engine(tuned[0], device="cpu", config=EngineConfig(kv_memory=0.01))
    for name, is_blind in (("drawn_pictures_held_out", False), ("drawn_pictures_blind", True)):
        (task,) = find_tasks([name], TaskOptions(limit=10))
        questions = task.questions()
        shown = {question.context[-1]["content"][0]["image"] for question in questions}
        grey = f"data:image/png;base64,{base64.b64encode(blank_png()).decode()}"
        assert (shown == {grey}) == is_blind
        outcomes = [outcome for batch in answers(engine, task, questions) for outcome in batch]
        assert len(outcomes) == 10 and {"accuracy", "accuracy_shape"} <= set(outcomes[0].scores)
        assert task.judge(questions[0], [task.reference(questions[0])]).scores["accuracy"] == 1


def test_a_model_without_eyes_is_told_so(tmp_path):
    engine = Engine(small_decoder("dense"), small_tokenizer(tmp_path), config=EngineConfig(kv_memory=0.01))
    (task,) = find_tasks(["drawn_pictures_held_out"], TaskOptions(limit=2))
    with pytest.raises(RequestError, match=r"no place for pictures|reads no pictures"):
        list(answers(engine, task, task.questions()))
