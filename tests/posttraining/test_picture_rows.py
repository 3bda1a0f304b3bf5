"""Pictures in rows: as parts, under columns, as files in a table, as a folder; and what is refused."""

import base64
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bessemer.core.errors import ArtefactError, SourceError
from bessemer.posttraining.data.examples import RowReader, files_fingerprint, read_conversations
from bessemer.posttraining.data.formats import as_answered, as_labelled, as_pair
from bessemer.posttraining.data.picture_rows import QUESTION, sources_in
from bessemer.posttraining.data.splitting import opening_of
from tests.model.picture_files import drawn, encoded

PNG = encoded(drawn(16, 16, seed=1))
URI = "data:image/png;base64," + base64.b64encode(PNG).decode()
TEXT = {"type": "text", "text": "what is it?"}


def conversation(*parts):
    return {"messages": [{"role": "user", "content": [*parts, TEXT]}, {"role": "assistant", "content": "a cat"}]}


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "cat.png", "detail": "low"}},
        {"type": "image_url", "image_url": "cat.png"},
        {"type": "image", "image": "cat.png"},
        {"type": "image", "path": "cat.png"},
        {"type": "image", "image": {"path": "cat.png", "bytes": None}},
    ],
)
def test_parts_of_every_form_are_one(part):
    asked, said = as_answered(conversation(part)).answer
    assert asked["content"] == [{"type": "image", "image": "cat.png"}, TEXT]
    assert said == {"role": "assistant", "content": "a cat"}


def test_bytes_and_anthropics_source_are_data():
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(PNG).decode()}
    for part in ({"type": "image", "source": source}, {"type": "image", "image": {"bytes": PNG}}):
        assert sources_in(as_answered(conversation(part)).answer) == [URI]


def test_a_column_of_pictures_fills_places_or_stands_before_the_question():
    turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a cat"}]
    for row in ({"image": "cat.png", "conversations": turns}, {"images": ["cat.png"], **conversation({"type": "image"})}):
        assert as_answered(row).answer[0]["content"] == [{"type": "image", "image": "cat.png"}, TEXT]
    plain = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a cat"}]
    row = {"images": ["a.png", "b.png"], "messages": plain}
    assert sources_in(as_answered(row).answer) == ["a.png", "b.png"]
    # a mark in a text without pictures is text
    assert as_answered({"conversations": turns}).answer[0]["content"] == "<image>\nwhat is it?"


def test_a_table_of_questions_and_answers_has_a_column_of_files(tmp_path):
    (tmp_path / "rows.csv").write_text(
        "image,question,answer\ncat.png,what is it?,a cat\n,who am I?,nobody\n", encoding="utf-8"
    )
    first, second = read_conversations(tmp_path / "rows.csv")
    assert first.messages[0]["content"] == [{"type": "image", "image": "cat.png"}, TEXT]
    assert first.folder == tmp_path
    assert second.messages[0]["content"] == "who am I?"


def test_labels_and_folders_are_questions(tmp_path):
    (tmp_path / "rows.csv").write_text("file,label\nwhite cat.png,cat\n", encoding="utf-8")
    (one,) = read_conversations(tmp_path / "rows.csv")
    folder = tmp_path / "pictures"
    for name in ("cat/1.png", "grey_dog/2.png"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(PNG)
    said = [(sources_in(each.messages), each.messages[0]["content"][1]["text"], each.messages[1]["content"]) for each in
            [one, *read_conversations(folder)]]  # fmt: skip
    assert said == [
        (["white cat.png"], QUESTION, "cat"),
        (["cat/1.png"], QUESTION, "cat"),
        (["grey_dog/2.png"], QUESTION, "grey dog"),
    ]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (
            conversation({"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}),
            "nothing is fetched for a row",
        ),
        (conversation({"type": "image"}), "the row holds none for it"),
        ({"images": ["a.png", "b.png"], **conversation({"type": "image"})}, "2 pictures are given, and the messages have 1"),
        (conversation({"type": "image", "image": 7}), "a picture is a path, bytes or a data: URI, got int"),
        ({"videos": ["a.mp4"], **conversation()}, "has videos, which are not learnt yet"),
    ],
)
def test_what_cannot_be_learnt_is_said_in_one_line(row, why):
    with pytest.raises(ValueError, match=why):
        as_answered(row)


def test_pairs_and_judged_answers_have_pictures_where_the_stage_reads_them():
    part = {"type": "image", "image": "cat.png"}
    prompt, answer = conversation(part)["messages"]
    with pytest.raises(ValueError, match="learnt by sft, finetune, preference and rl alone"):
        as_pair({"prompt": [prompt], "chosen": [answer], "rejected": [answer | {"content": "a dog"}]})
    with pytest.raises(ValueError, match="learnt by sft, finetune, preference and rl alone"):
        as_labelled(conversation(part) | {"label": True})
    pair = as_pair({"prompt": [prompt], "chosen": [answer], "rejected": [answer | {"content": "a dog"}]}, pictures=True)
    assert sources_in(pair.prompt) == ["cat.png"]
    judged = as_labelled(conversation(part) | {"label": True}, pictures=True)
    assert sources_in(judged.answered.prompt) == ["cat.png"] and judged.is_desirable


def test_one_picture_lies_on_one_side_whatever_is_asked(tmp_path):
    (tmp_path / "rows.csv").write_text(
        "image,question,answer\na.png,what?,x\na.png,where is it?,y\nb.png,what?,z\n", encoding="utf-8"
    )
    first, second, third = (opening_of(one.answered) for one in read_conversations(tmp_path / "rows.csv"))
    assert first == second != third


def test_the_key_of_data_holds_its_pictures(tmp_path):
    (tmp_path / "rows.csv").write_text("image,question,answer\ncat.png,what?,a cat\n", encoding="utf-8")
    (tmp_path / "cat.png").write_bytes(PNG)
    before = files_fingerprint(["rows.csv"], tmp_path)
    assert files_fingerprint(["rows.csv"], tmp_path) == before
    (tmp_path / "cat.png").write_bytes(encoded(drawn(16, 16, seed=2)))
    assert files_fingerprint(["rows.csv"], tmp_path) != before


def test_a_folder_of_pictures_without_labels_is_no_data(tmp_path):
    (tmp_path / "cat.png").write_bytes(PNG)
    with pytest.raises(SourceError, match="holds no table and no text"):
        read_conversations(tmp_path)


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_a_tar_of_pictures_is_read_and_never_unpacked(tmp_path):
    said = json.dumps({"conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a dog"}]})
    first = write_tar(tmp_path / "0.tar", [("1.png", PNG), ("1.txt", b"a cat\n"), ("2.png", PNG), ("2.cls", b"dog")])
    write_tar(tmp_path / "1.tar", [("a/3.png", PNG), ("a/3.json", said.encode())])
    one, two = read_conversations(first)
    assert sources_in(one.messages) == [URI] and one.messages[1]["content"] == "a cat"
    assert two.messages[0]["content"][1]["text"] == QUESTION and two.messages[1]["content"] == "dog"
    (three,) = read_conversations(tmp_path / "1.tar")
    assert three.messages[0]["content"] == [{"type": "image", "image": URI}, {"type": "text", "text": "what?"}]


def test_a_tar_that_leads_outward_or_is_none_is_refused(tmp_path):
    good = [(f"{number}.{ending}", PNG if ending == "png" else b"cat") for number in range(40) for ending in ("png", "txt")]
    path = write_tar(tmp_path / "out.tar", [*good, ("../../41.png", PNG), ("../../41.txt", b"cat")])
    reader = RowReader()
    assert len(read_conversations(path, reader=reader)) == 40
    assert [row.why for row in reader.bad] == ["its name leads out of the archive"]
    (tmp_path / "none.tar").write_bytes(b"this is no archive at all")
    with pytest.raises(ArtefactError, match=r"none\.tar: no tar that can be read"):
        read_conversations(tmp_path / "none.tar")


def test_a_parquet_file_holds_the_bytes_of_pictures(tmp_path):
    table = pa.table({"image": [{"bytes": PNG, "path": "cat.png"}], "question": ["what?"], "answer": ["a cat"]})
    pq.write_table(table, tmp_path / "rows.parquet")
    (one,) = read_conversations(tmp_path / "rows.parquet")
    assert sources_in(one.messages) == [URI]
