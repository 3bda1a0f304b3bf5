"""A conversation that is longer than the context is answered by passages of itself."""

from __future__ import annotations

from bessemer.assistant.messages import Message, MessagePart
from bessemer.retrieval.long_documents import OMITTED, Shortened, retrieved_from_itself

SECTIONS = [f"Section {number} is about topic{number} and nothing else. " * 12 for number in range(40)]
SENTENCES = [section[: section.index(".") + 1] for section in SECTIONS]
DOCUMENT = "\n\n".join(SECTIONS)
QUESTION = "What is said about topic17?"


def within(characters):
    return lambda messages: sum(len(message.text) for message in messages) <= characters


def test_a_document_above_its_question_is_cut_to_what_answers_it_and_the_question_stays():
    for text in (f"{DOCUMENT}\n\n{QUESTION}", f"{QUESTION}\n\n{DOCUMENT}"):
        found = retrieved_from_itself([Message.system("Be brief."), Message.user(text)], within(3000))
        system, user = found.messages
        assert system.text == "Be brief." and QUESTION in user.text and SENTENCES[17] in user.text
        assert OMITTED in user.text and len(user.text) <= 3000 - len("Be brief.")
        # what is left of the room holds the beginning
        assert SENTENCES[0] in user.text and found.omitted == len(text) - len(user.text)


def test_a_document_of_an_earlier_turn_is_cut_by_the_last_question_and_keeps_its_order_and_origin():
    document = Message("user", (MessagePart("Read this:", "user"), MessagePart(DOCUMENT, "document", "a.md")))
    messages = [document, Message.assistant("Done."), Message.user("Compare topic30 with topic5.")]
    found = retrieved_from_itself(messages, within(2500))
    text = found.messages[0].parts[1]
    assert (text.origin, text.source) == ("document", "a.md") and found.messages[1:] == messages[1:]
    assert text.text.index(SENTENCES[5]) < text.text.index(SENTENCES[30])


def test_passages_stay_below_their_headings():
    text = "\n\n".join(f"# Part {number}\n\n{section}" for number, section in enumerate(SECTIONS))
    found = retrieved_from_itself([Message.user(text), Message.user(QUESTION)], within(1500))
    assert f"# Part 17\n\n{SENTENCES[17]}" in found.messages[0].text


def test_what_fits_stays_as_it_is_and_what_cannot_be_made_to_fit_is_left_to_the_check():
    short = [Message.user(QUESTION)]
    assert retrieved_from_itself(short, within(100)) == Shortened(short, 0)
    instructions = [Message.system(DOCUMENT), Message.user(QUESTION)]
    assert retrieved_from_itself(instructions, within(100)).messages == instructions
    # one paragraph without an end is cut all the same
    found = retrieved_from_itself([Message.user("word " * 5000), Message.user(QUESTION)], within(2000))
    assert within(2000)(found.messages) and found.omitted > 20_000


def test_the_passages_of_several_long_texts_are_compared_with_each_other():
    messages = [Message.user("\n\n".join(SECTIONS[20:])), Message.tool("a", "read", "\n\n".join(SECTIONS[:20]))]
    found = retrieved_from_itself([*messages, Message.user("topic17 or topic33?")], within(3000))
    assert SENTENCES[33] in found.messages[0].text and SENTENCES[17] in found.messages[1].text
    assert within(3000)(found.messages) and found.messages[1].parts[0].origin == "tool"
