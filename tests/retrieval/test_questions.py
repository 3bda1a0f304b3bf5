"""Questions made from an index, and conversations that teach to cite."""

from __future__ import annotations

import json

import pytest

from bessemer.assistant.messages import Message
from bessemer.core.errors import SourceError
from bessemer.retrieval.answer import NOT_HELD, checked, grounded
from bessemer.retrieval.config import IndexConfig
from bessemer.retrieval.index import IndexedDocument, build_index, open_index
from bessemer.retrieval.questions import cited_conversations, contrastive_rows, make_questions, question_of
from bessemer.retrieval.search import Hit
from bessemer.retrieval.store import Passage
from tests.cli.test_main import bessemer, one_error

pytest.importorskip("lancedb")

METALS = ("iron", "copper", "zinc", "lead", "nickel", "cobalt", "silver", "gold", "tin", "chromium")


def documents():
    for metal in METALS:
        text = f"Return the melting point of {metal} in kelvin.\n\nThe metal {metal} melts slowly [1]."
        yield IndexedDocument(f"{metal}.py", text, f"metals.{metal}(unit)")
    yield IndexedDocument("notes.md", "# Rust\n\nwithout a whole sentence")


def error_of(capsys, *words):
    """The one line of a command that is refused with exit code 2."""
    status, _, err = bessemer(capsys, *words)
    assert status == 2
    return one_error(err)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions") / "index"
    build_index(documents(), folder, IndexConfig(embedder="none"))
    return open_index(folder)


def passage(text, title="", headings=""):
    return Passage("1", "d", 0, title, headings, text, 0, len(text.encode()), "notes")


def test_a_question_is_of_the_subject_or_of_what_a_function_does():
    found = {
        question_of(passage("Returns the length of the longest word.", "texts.longest(text)"), seed).text for seed in range(12)
    }
    assert found == {"What does texts.longest do?", "How do I get the length of the longest word?"}
    assert question_of(passage("Rest well and long enough.", headings="Health › Sleep")).subject == "Sleep"
    assert question_of(passage("no sentence here", "a title")) is None
    assert question_of(passage("A sentence stands here, whole.")) is None


def test_each_document_gives_one_question_and_the_seed_draws_them(index):
    made = make_questions(index, 100, seed=1)
    assert sorted(one.passage.document for one in made) == sorted(f"{metal}.py" for metal in METALS)
    assert make_questions(index, 4, seed=1) == made[:4] != make_questions(index, 4, seed=2)
    assert all(one.answer == f"Return the melting point of {one.subject.removeprefix('metals.')} in kelvin." for one in made)


def test_an_answer_cites_the_passage_among_others_or_says_that_none_holds_it(index):
    rows = list(cited_conversations(index, 100, unanswered=0.4, seed=3))
    held = [row for row in rows if row["held"]]
    assert len(rows) == len(METALS) > len(held) > 2
    places = set()
    for row in rows:
        system, user, assistant = (message["content"] for message in row["messages"])
        assert user.startswith("Sources:\n\n[1] ") and system
        answer = assistant
        metal = row["document"].removesuffix(".py")
        if not row["held"]:
            assert answer == NOT_HELD and f"the melting point of {metal} in" not in user.partition("Question:")[0]
            continue
        sources = [
            Hit(passage(text.partition(" ")[2]), 1.0, {}, {}) for text in user.partition("\n\nQuestion")[0].split("\n\n[")[1:]
        ]
        (statement,) = checked(answer, sources).statements
        (number,) = statement.cited
        assert f"metals.{metal}(" in sources[number - 1].passage.text and statement.support > 0.7
        places.add(number)
    assert len(places) > 1  # not always the first


def test_questions_for_an_embedder_have_passages_that_do_not_answer_them_and_half_lack_their_own_words(index):
    rows = list(contrastive_rows(index, 100, 3, seed=1))
    assert len(rows) == len(METALS) and all(len(row["negatives"]) == 3 for row in rows)
    whole = 0
    for row in rows:
        metal = row["document"].removesuffix(".py")
        assert f"The metal {metal} melts slowly" in row["text"]
        assert not any(f"point of {metal} in" in other for other in row["negatives"])
        is_whole = row["text"].startswith(f"metals.{metal}(unit)\nReturn the melting point of {metal} in kelvin.")
        # of the name only the text is left, and of the sentence only what follows it
        left = row["text"].startswith("Return") if "What does" in row["question"] else "kelvin" not in row["text"]
        assert is_whole or left
        whole += is_whole
    assert 0 < whole < len(rows)


def test_conversations_have_the_form_in_which_ask_shows_sources(index):
    row = next(cited_conversations(index, 1, unanswered=0))
    question = row["messages"][1]["content"].rpartition("Question: ")[2]
    (own,) = [one for one in index.store.passages() if one.document == row["document"]]
    # a number in brackets of the text itself is no citation
    _, asked = grounded([Message.user(question)], [Hit(own, 1.0, {}, {})])
    assert asked.text.count("[1]") == 1 and "slowly (1)" in row["messages"][1]["content"]


def test_the_command_writes_rows_for_an_embedder(index, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    status, shown, _ = bessemer(capsys, "questions", index.folder, out, "--negatives", "2", "-n", "4")
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert status == 0 and "4 questions" in shown and all(len(row["negatives"]) == 2 and row["text"] for row in rows)
    both = error_of(capsys, "questions", index.folder, tmp_path / "b.jsonl", "--negatives", "2", "--cited")
    assert "give one" in both


def test_the_command_writes_rows_and_keeps_what_is_there(index, tmp_path, capsys):
    status, shown, _ = bessemer(capsys, "questions", index.folder, tmp_path / "cited.jsonl", "--cited", "-n", "5")
    rows = [json.loads(line) for line in (tmp_path / "cited.jsonl").read_text(encoding="utf-8").splitlines()]
    assert status == 0 and "5 conversations" in shown and [one["role"] for one in rows[0]["messages"]][-1] == "assistant"
    assert "is there already" in error_of(capsys, "questions", index.folder, tmp_path / "cited.jsonl")
    assert bessemer(capsys, "questions", index.folder, tmp_path / "asked.jsonl")[0] == 0
    assert set(json.loads((tmp_path / "asked.jsonl").read_text(encoding="utf-8").splitlines()[0])) == {
        "question",
        "document",
        "passage",
        "answer",
    }


def test_an_index_without_sentences_gives_no_question(tmp_path):
    build_index([IndexedDocument("a.md", "words and words")], tmp_path / "index", IndexConfig(embedder="none"))
    with pytest.raises(SourceError, match="no passage of this index gives a question"):
        make_questions(open_index(tmp_path / "index"), 3)
