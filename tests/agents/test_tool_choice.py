from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.agents.tool_choice import bm25_scores, choose_tools
from bessemer.assistant.tools import Tool

TOOLS = [
    Tool("send_mail", "Send an e-mail to a person."),
    Tool("getCurrentTimes", "The clock in a time zone."),
    Tool("weather", "The forecast of a city.", {"type": "object", "properties": {"zone": {"description": "a place"}}}),
]


def names(tools):
    return [tool.name for tool in tools]


def test_all_tools_are_offered_where_they_fit():
    assert choose_tools(TOOLS, "anything", 10_000) == TOOLS


def test_the_tools_with_the_question_s_words_come_first_and_stay_in_their_order():
    chosen = choose_tools(TOOLS, "What time is it, and what is the weather?", 2, count=lambda tool: 1)
    assert names(chosen) == ["getCurrentTimes", "weather"]


def test_tools_that_were_offered_before_stay():
    assert names(choose_tools(TOOLS, "What time is it?", 1, kept={"send_mail"}, count=lambda tool: 1)) == ["send_mail"]


def test_scores_are_those_of_the_formula():
    # two documents, one of which has the word, twice: idf = ln(1 + 1.5/1.5); length 3 of a mean of 2
    (score, other) = bm25_scores(["time time zone", "mail"], "time")
    norm = 1.2 * (1 - 0.75 + 0.75 * 3 / 2)
    assert abs(score - 0.6931471805599453 * 2 * 2.2 / (2 + norm)) < 1e-12 and other == 0


TEN = [Tool(f"tool{number}", "Does something.") for number in range(10)]


@settings(max_examples=30)
@given(st.lists(st.integers(1, 50), min_size=10, max_size=10), st.integers(0, 120), st.text(max_size=20))
def test_the_budget_is_never_exceeded(costs, budget, question):
    cost_of = dict(zip(names(TEN), costs, strict=True))
    chosen = choose_tools(TEN, question, budget, count=lambda tool: cost_of[tool.name])
    assert sum(cost_of[tool.name] for tool in chosen) <= budget
