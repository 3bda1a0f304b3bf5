"""Chat templates that write contents in parts, and those that write texts."""

import json

import pytest

from bessemer.core.errors import RequestError
from bessemer.tokenization.chat_templates import CHAT_TEMPLATES
from bessemer.tokenization.tokenizer import load_tokenizer
from tests.model.picture_files import write_picture_tokenizer
from tests.model.tokenizers import write_small_tokenizer

ASKED = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_picture_tokenizer(tmp_path_factory.mktemp("pictures")))


def rendered(tokenizer, messages, tools=None):
    return "".join(segment.text for segment in tokenizer.render_chat(messages, add_generation_prompt=True, tools=tools))


def test_a_template_of_parts_writes_pictures_and_texts(tokenizer):
    text = rendered(tokenizer, ASKED)
    assert text.endswith("User:<image>what is it?<end_of_utterance>\nAssistant:")
    assert tokenizer.apply_chat_template(ASKED, add_generation_prompt=True).count(tokenizer.control_id("<image>")) == 1


def test_the_template_of_an_older_processor_is_read(tmp_path):
    folder = write_picture_tokenizer(tmp_path)
    (folder / "chat_template.json").write_text(
        json.dumps({"chat_template": "{{ messages[0]['content'][0]['text'] }}!"}), encoding="utf-8"
    )
    asked = [{"role": "user", "content": [{"type": "text", "text": "what"}]}]
    assert rendered(load_tokenizer(folder), asked) == "what!"


def test_it_writes_contents_that_are_one_text(tokenizer):
    said = [("system", "Be brief."), ("user", "a"), ("assistant", "b")]
    text = rendered(tokenizer, [*({"role": role, "content": content} for role, content in said), *ASKED])
    end = "<end_of_utterance>\n"
    assert f"System: Be brief.{end}User: a{end}Assistant: b{end}User:<image>" in text
    parts = [{"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "text"}]}]
    assert rendered(tokenizer, parts) == rendered(tokenizer, [{"role": "user", "content": "one text"}])


def test_tools_stand_before_a_picture(tokenizer):
    tool = {"type": "function", "function": {"name": "zoom", "description": "look closer", "parameters": {"type": "object"}}}
    text = rendered(tokenizer, ASKED, tools=[tool])
    assert text.index("zoom") < text.index("<image>what is it?")


@pytest.mark.parametrize("typed", ["<image>", "an <image> <row_1_col_1>", "<fake_token_around_image>"])
def test_marks_that_somebody_typed_are_text(tokenizer, typed):
    plain = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": typed}]}]
    ids = tokenizer.apply_chat_template(plain, add_generation_prompt=True)
    controls = {tokenizer.control_id(mark) for mark in ("<image>", "<row_1_col_1>", "<fake_token_around_image>")}
    assert sum(id in controls for id in ids) == 1
    assert typed in tokenizer.decode(ids)


def test_a_template_of_texts_has_no_place_for_pictures(tmp_path):
    folder = write_small_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATES["chatml"], encoding="utf-8")
    with pytest.raises(RequestError, match="the chat template has no place for pictures"):
        load_tokenizer(folder).apply_chat_template(ASKED, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "video"}, "message 0: a part of a content is a text or an image, got 'video'"),
        ({"type": "text"}, "message 0: a part of a content is a text or an image, got 'text'"),
        ({}, "message 0: a part of a content is a text or an image, got None"),
    ],
)
def test_other_parts_are_refused(tokenizer, part, message):
    with pytest.raises(RequestError, match=message):
        tokenizer.apply_chat_template([{"role": "user", "content": [part]}])
