import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.posttraining.synthetic.documentation import LONGEST_ANSWER, first_sentence, has_question, make_questions
from tests.training.conftest import write_documentation


def pairs(conversations):
    return [(conversation.messages[0]["content"], conversation.messages[1]["content"]) for conversation in conversations]


def entry(qualname, *, package="known", module="known.m", docstring="Do what is said here.", signature=None, kind="function"):
    metadata = [("package", package), ("module", module), ("qualname", qualname), ("kind", kind)]
    metadata += [("signature", signature)] if signature else []
    return f"{module}.{qualname}\n\n{docstring}", package, metadata


def test_they_ask_for_purpose_signature_and_module(tmp_path):
    rows = [entry(f"f{number}", signature=f"f{number}(a)") for number in range(60)]
    documents = write_documentation(tmp_path / "documents", rows)
    made = dict(pairs(make_questions(documents, "train", 60, seed=1)))
    assert len(made) == 60 and has_question(documents, "train")
    kinds = {"What does": "Do what is said here.", "What is": "(a)`.", "Which module": "It is defined in `known.m`."}
    for opening, answer in kinds.items():
        answers = [given for question, given in made.items() if question.startswith(opening)]
        assert len(answers) > 5 and all(given.endswith(answer) for given in answers)


def test_a_name_that_occurs_twice_in_its_package_is_not_asked_about(tmp_path):
    rows = [entry("same", module="known.a"), entry("same", module="known.b"), entry("other"), entry("same", package="third")]
    made = pairs(make_questions(write_documentation(tmp_path / "documents", rows), "train", 10, seed=1))
    assert len(made) == 2
    assert sum("`other`" in question for question, _ in made) == 1
    assert sum("of third" in question or "third defines" in question for question, _ in made) == 1


def test_private_names_and_other_documents_give_none(tmp_path):
    rows = [entry("_private"), entry("Class.__init__"), entry("", kind="module"), ("some page", "known", [])]
    documents = write_documentation(tmp_path / "documents", rows)
    assert make_questions(documents, "train", 10, seed=1) == [] and not has_question(documents, "train")


def test_each_split_is_asked_about_its_own_documents(documents):
    train, held_out = (make_questions(documents, split, 1000, seed=1) for split in ("train", "validation"))
    assert len(train) == 200 and len(held_out) == 40
    assert all("known" in question for question, _ in pairs(train))
    assert all("held" in question for question, _ in pairs(held_out))


def test_the_seed_draws_them_and_a_smaller_count_is_a_part(documents):
    many = make_questions(documents, "train", 100, seed=1)
    assert many == make_questions(documents, "train", 100, seed=1)
    assert many[:30] == make_questions(documents, "train", 30, seed=1)
    assert many != make_questions(documents, "train", 100, seed=2)


@pytest.mark.parametrize(
    "docstring, sentence",
    [
        ("Return the\n  smallest value. And more.", "Return the smallest value."),
        ("Return x.y of the frame, or None.\n\nMore.", "Return x.y of the frame, or None."),
        ("Compare values, e.g. numbers. And more.", None),
        ("Too short.", None),
        ("No full stop here", None),
        (":param x: a value that is given.", None),
        ("See the following::", None),
        ("Return the " + "long " * 40 + "sentence.", None),
        ("", None),
    ],
)
def test_the_first_sentence_is_plain_or_left_out(docstring, sentence):
    assert first_sentence(f"known.m.f(x)\n\n{docstring}") == sentence


@settings(deadline=None)
@given(st.text())
def test_any_text_gives_a_short_line_or_none(text):
    sentence = first_sentence(text)
    assert sentence is None or (len(sentence) <= LONGEST_ANSWER and sentence.isprintable())
