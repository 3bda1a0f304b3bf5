"""Files as people bring them: what is learnt of them is the same whatever form they have, and what was understood is said."""

import json
import logging
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from functools import partial

import pytest

from bessemer.core.errors import SourceError
from bessemer.core.store import read_json
from bessemer.model.formats import packaged_smollm2
from bessemer.model.formats.gguf_import import import_gguf
from bessemer.posttraining.data.examples import RowReader, previewed, read_conversations
from bessemer.posttraining.data.formats import Answered
from bessemer.posttraining.data.mask import preview_masks
from bessemer.posttraining.data.understanding import passages
from bessemer.posttraining.sft.config import FinetuneConfig, SFTConfig
from bessemer.posttraining.sft.finetune_plan import settings_of
from bessemer.posttraining.sft.stage import gather_conversations
from bessemer.tokenization.tokenizer import load_tokenizer
from tests.cli.test_main import bessemer, one_error
from tests.literate import free_port
from tests.posttraining.brought_files import CALLING, FOREIGN, ROWS, TABLES, foreign_csv, foreign_rows, notes

pytestmark = pytest.mark.usefixtures("one_thread")


def last_question_and_answer(conversation):
    asked = [one["content"] for one in conversation.messages if one["role"] == "user"]
    return asked[-1], conversation.messages[-1]["content"]


@pytest.mark.parametrize("make", TABLES, ids=lambda make: make.__name__)
def test_the_same_is_learnt_whatever_form_a_table_has(tmp_path, make, caplog):
    caplog.set_level(logging.ERROR)
    settings = settings_of(FinetuneConfig(held_out=0.2), make(tmp_path))
    reader = RowReader()
    training, held_out = gather_conversations(SFTConfig.parse(settings), None, tmp_path, seed=1, reader=reader)
    learnt = sorted(map(last_question_and_answer, [*training, *held_out]))
    # a cell of CSV and of a workbook keeps its line ends
    assert learnt == sorted(ROWS) and len(reader.bad) == TABLES[make]


@pytest.mark.parametrize("encoding", FOREIGN)
def test_other_scripts_are_read_shown_and_learnt_as_they_are_written(model_folder, tmp_path, encoding):
    path, rows = foreign_csv(tmp_path, encoding), foreign_rows(encoding)
    conversations = read_conversations(path, ("question", "answer"))
    assert list(map(last_question_and_answer, conversations)) == rows
    assert any(rows[0][0] in line for line in previewed(str(path)).lines())
    (row,) = preview_masks(conversations[:1], load_tokenizer(model_folder), [0], 1024).rows
    tokens = [token for example in row.examples for token in example]
    # characters of several tokens, of which none is cut where the answer begins
    assert "".join(token.text for token in tokens if token.is_learnt and not token.is_end).strip() == rows[0][1]
    assert rows[0][0] in "".join(token.text for token in tokens if not token.is_learnt)


def test_openai_messages_keep_all_that_they_say(tmp_path):
    (make,) = (one for one in TABLES if one.__name__ == "openai_messages")
    conversations = read_conversations(make(tmp_path))
    first, calling = conversations[0], conversations[CALLING[0]]
    assert [one["role"] for one in first.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert first.messages[2]["weight"] == 0 and first.messages[1]["content"] == ROWS[0][0]
    call = {"type": "function", "function": {"name": "find_order", "arguments": {"order": CALLING[0]}}}
    assert calling.messages[2:4] == (
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "found", "name": "find_order"},
    )
    assert [tool["function"]["name"] for tool in calling.tools] == ["find_order"]


def test_a_folder_of_texts_is_passages_that_are_learnt_whole(tmp_path):
    conversations = read_conversations(notes(tmp_path))
    assert len(conversations) == 12 and all(one.is_document for one in conversations)
    assert all(isinstance(one.answered, Answered) and "Möller" in one.answered.answer for one in conversations)
    assert "Öfen" in conversations[0].answered.answer and conversations[0].place.endswith("deep/t0.txt:1")


def test_passages_are_whole_paragraphs_and_lose_nothing():
    paragraphs = [f"Paragraph {n}: " + "word " * (n % 50) for n in range(200)]
    text = "\r\n\r\n".join(paragraphs)
    cut = list(passages(text))
    assert [one for _, passage in cut for one in passage.split("\n\n")] == paragraphs
    lines = text.split("\r\n")
    assert all(lines[line - 1] == passage.split("\n")[0] for line, passage in cut)
    assert max(len(passage) for _, passage in cut) <= 4000
    # a paragraph that is too long is cut behind a sentence, or where nothing ends
    sentences = "One more sentence about steel. " * 400
    pieces = [passage for _, passage in passages(sentences + "x" * 9000)]
    assert "".join(pieces) == sentences + "x" * 9000 and max(map(len, pieces)) <= 4000
    assert all(piece.endswith("steel. ") for piece in pieces[:2])


def test_what_was_understood_is_said_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [*ROWS[:30], ("Und?", ""), ("Nun?", " ")]
    (tmp_path / "t.csv").write_bytes("\n".join(["Question;Answer;Nr", *(f"{q};{a!r};1" for q, a in rows)]).encode("cp1252"))
    bad = [f"{{broken {n}" for n in range(1)]
    (tmp_path / "s.jsonl").write_text(
        "\n".join(
            [
                *(
                    json.dumps(
                        {"system": "Kurz.", "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
                    )
                    for q, a in ROWS
                ),
                *bad,
            ]
        ),
        encoding="utf-8",
    )
    lines = previewed("s.jsonl").lines()
    assert lines[:6] == [
        "s.jsonl: JSON lines",
        "  61 rows: conversations in ShareGPT's form (from, value)",
        "  'conversations' is the conversation",
        "  'system' is the system message",
        "  1 of 61 rows cannot be used and is left out:",
        "    line 61: is not JSON (Expecting property name enclosed in double quotes)",
    ]
    assert lines[6:10] == [
        "  line 1:",
        "    system: Kurz.",
        "    user: Wo ist Bestellung 0?",
        '    assistant: Bestellung 0 ist „unterwegs“; über Köln, "Tor 0".',
    ]
    lines = previewed("t.csv").lines()
    assert lines[:5] == [
        "t.csv: CSV; read as cp1252; columns separated by semicolons",
        "  32 rows: questions and answers in two columns",
        "  'Question' is what the user says",
        "  'Answer' is the answer",
        "  not used: 'Nr'",
    ]


def test_bad_rows_are_left_out_up_to_a_twentieth(tmp_path, caplog):
    path = tmp_path / "t.jsonl"
    good, bad = '{"prompt": "a", "completion": "b"}\n', '{"prompt": "a", "completion": ""}\n'
    path.write_text(good * 38 + bad * 2, encoding="utf-8")
    reader = RowReader()
    assert len(read_conversations(path, reader=reader)) == 38
    assert [row.place for row in reader.bad] == [f"{path}:39", f"{path}:40"] and reader.figures == {"bad_rows": 2}
    assert caplog.messages == [
        f"note: {path}: 2 of 40 rows cannot be used and are left out: line 39: completion: the answer is empty (and 1 more: "
        "line 40)"
    ]
    with pytest.raises(SourceError, match=r"t.jsonl:39: completion: the answer is empty .*; mend them, or leave bad rows out"):
        read_conversations(path, reader=RowReader("stop"))
    path.write_text(good * 37 + bad * 2, encoding="utf-8")
    with pytest.raises(SourceError, match=r"t.jsonl:38: .*; 2 of 39 rows cannot be used, more than a twentieth; mend them"):
        read_conversations(path)


def test_the_command_says_what_it_understood_before_it_trains(model_folder, tmp_path, capsys):
    path = tmp_path / "tickets.jsonl"
    rows = [{"instruction": f"Where is order {n}?", "input": "", "output": f"Order {n} is on its way."} for n in range(60)]
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"instruction": "Hm?", "input": "", "output": ""}]), encoding="utf-8"
    )
    out = tmp_path / "out"
    asked = ("finetune", model_folder, path, out, "--method", "lora", "--epochs", 0.1, "--device", "cpu")
    code, _, said = bessemer(capsys, *asked, "--general", "none")
    assert code == 0
    before, _, _ = said.partition("lora:")
    assert (
        "61 rows: instructions in Alpaca's form" in before and "line 61: needs a text under 'output', which is empty" in before
    )
    assert read_json(out / "finetune.json")["result"]["metrics"]["bad_rows"] == 1
    (line,) = (out / "bad_rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {"place": f"{path}:61", "reason": "needs a text under 'output', which is empty"}
    code, _, err = bessemer(capsys, *asked[:3], tmp_path / "strict", "--on-bad-row", "stop")
    assert code == 2 and f"{path}:61: needs a text under 'output'" in one_error(err) and not (tmp_path / "strict").exists()


def test_a_folder_of_notes_becomes_an_adapter(model_folder, tmp_path, capsys):
    asked = (
        "finetune",
        model_folder,
        notes(tmp_path),
        tmp_path / "out",
        "--method",
        "lora",
        "--epochs",
        0.1,
        "--held-out",
        0.3,
    )
    code, _, said = bessemer(capsys, *asked, "--context-length", 64, "--device", "cpu", "--general", "none")
    assert code == 0 and "12 rows: texts without questions, which are learnt whole (continued training)" in said
    assert (tmp_path / "out" / "adapter").is_dir()


@contextmanager
def serving(out):
    """While entered, `bessemer serve` of a folder in a process of its own; its URL."""
    port = free_port()
    command = [sys.executable, "-m", "bessemer", "serve", str(out), "--port", port, "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8") as server:
        url = f"http://127.0.0.1:{port}"
        try:
            while True:
                assert server.poll() is None, server.stderr.read()
                with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=60):
                    break
                time.sleep(0.2)
            yield url
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M-Instruct as a folder, imported once."""
    folder = tmp_path_factory.mktemp("base") / "smollm2"
    import_gguf(packaged_smollm2(), folder)
    return folder


@pytest.mark.peer(name="smollm2")
@pytest.mark.parametrize(
    "make",
    [*TABLES, notes, *(partial(foreign_csv, encoding=encoding) for encoding in FOREIGN)],
    ids=lambda make: make.keywords["encoding"] if isinstance(make, partial) else make.__name__,
)
def test_smollm2_learns_every_kind_of_file_and_serves_it(smollm2, tmp_path, capsys, make):
    asked = ["finetune", smollm2, make(tmp_path), tmp_path / "out", "--method", "lora", "--epochs", 0.1, "--general", "none"]
    # notes are few passages, and long ones
    asked += ["--held-out", 0.3, "--context-length", 128] if make is notes else []
    code, printed, said = bessemer(capsys, *asked, "--batch-size", 1, "--device", "cpu")
    with capsys.disabled():
        print(f"\n--- {asked[2].name}\n{said}{printed}")
    assert code == 0 and printed.splitlines()[-1].startswith("use it: bessemer chat ")
    from openai import OpenAI

    with serving(tmp_path / "out") as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="any")
        messages = [{"role": "user", "content": ROWS[0][0]}]
        answer = client.chat.completions.create(model="out", messages=messages, max_tokens=8)
    assert answer.choices[0].message.content and answer.usage.completion_tokens <= 8


@pytest.mark.slow
# conversations with tools are longer than the rows of the small model
@pytest.mark.parametrize("make", [one for one in TABLES if one.__name__ != "openai_messages"], ids=lambda make: make.__name__)
def test_every_table_becomes_an_adapter(model_folder, tmp_path, capsys, make):
    asked = ("finetune", model_folder, make(tmp_path), tmp_path / "out", "--method", "lora", "--epochs", 0.1, "--device", "cpu")
    code, printed, _ = bessemer(capsys, *asked)
    assert code == 0 and printed.splitlines()[-1].startswith("use it: bessemer chat ")


def test_the_preview_command_says_the_same_and_its_code_is_that_of_a_training(tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', encoding="utf-8")
    code, printed, _ = bessemer(capsys, "data", "preview", path)
    assert code == 0 and printed.splitlines()[1:] == [
        "  1 row: pairs of answers",
        "  'prompt' is what is asked",
        "  'chosen' is the better answer",
        "  'rejected' is the worse answer",
        "  line 1:",
        "    prompt: a",
        "    better: b",
        "    worse: c",
    ]
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n', encoding="utf-8")
    code, printed, err = bessemer(capsys, "data", "preview", path)
    assert code == 2 and "1 of 1 rows cannot be used" in printed and "more than a twentieth" in one_error(err)
