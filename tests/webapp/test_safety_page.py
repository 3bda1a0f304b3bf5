"""The page of safety: the policy, the guard's decisions with the lines that led to them, and red teams' findings."""

import httpx
import pytest

from bessemer.core.policy import PolicyLines, read_policy
from bessemer.safety.config import GuardConfig
from bessemer.safety.guard import Guard
from bessemer.safety.hook import GuardHook
from bessemer.safety.redteam.config import RedTeamConfig
from bessemer.safety.redteam.run import attack_model
from bessemer.safety.redteam.targets import Reply
from bessemer.webapp.app import WebSettings, web_pages
from tests.safety.policies import PRINCIPLES
from tests.serving.engine import FakeEngine
from tests.serving.running import servers
from tests.webapp.test_accessibility import faults

POLICY = f"""\
format: 1
name: furnace
categories:
  slag: {{code: S1, meaning: talk of slag, terms: [slag]}}
  soot: {{code: S2, meaning: talk of soot, terms: [soot]}}
principles: {PRINCIPLES}
surfaces:
  prompt:
    otherwise: log
    categories:
      slag: refuse
"""


class Polite:
    """Refuses everything."""

    at_once = 8

    def ask(self, asked):
        return enumerate(Reply("I'm sorry, but I can't help with that.") for _ in asked)

    def white_box(self):
        return None


@pytest.fixture(scope="module")
def start_guarded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("safety")
    (folder / "policy.yaml").write_text(POLICY, encoding="utf-8")
    config = RedTeamConfig(attacks=["direct"], categories=["privacy"], limit=1)
    attack_model(config, Polite(), folder / "redteam" / "polite", model={"name": "polite"})
    (folder / "redteam" / "torn").mkdir()
    (folder / "redteam" / "torn" / "results.json").write_text("{", encoding="utf-8")
    with servers() as start:

        def start_guarded(*, texts: bool = False) -> str:
            guard = Guard(read_policy(folder / "policy.yaml"), GuardConfig(rails=["rules", "words"], audit_content=texts))
            lines = PolicyLines.read(folder / "policy.yaml")
            pages = web_pages(WebSettings(policy=lines, redteams=folder / "redteam"))
            return start(FakeEngine(), pages, hooks=[GuardHook(guard)])

        yield start_guarded


@pytest.fixture(scope="module")
def url(start_guarded):
    return start_guarded(texts=True)


def say(url: str, text: str) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 4}
    assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).status_code == 200


def test_a_decision_is_shown_with_its_rule_and_the_policys_line(url):
    say(url, "What is slag?")
    say(url, "And soot?")
    soot, slag = httpx.get(f"{url}/inspect/safety").json()["decisions"][:2]
    assert (slag["action"], slag["rule"], slag["text"]) == ("refuse", "term 'slag'", "What is slag?")
    assert (slag["place"], slag["line"]) == ("policy.yaml:11: surfaces.prompt.categories.slag", "slag: refuse")
    assert (soot["action"], soot["place"]) == ("log", "policy.yaml:9: surfaces.prompt.otherwise")


def test_without_being_asked_to_the_page_has_no_text_of_a_conversation(start_guarded):
    url = start_guarded()
    say(url, "What is slag?")
    found = httpx.get(f"{url}/inspect/safety").json()
    assert not found["texts"] and "text" not in found["decisions"][0] and "What is" not in str(found["decisions"])


def test_a_text_is_put_to_the_guard_and_not_noted_down(url):
    before = len(httpx.get(f"{url}/inspect/safety").json()["decisions"])
    answer = httpx.post(f"{url}/inspect/safety/check", json={"text": "5lag", "surface": "prompt"}).json()
    assert answer["decision"]["action"] == "refuse" and answer["decision"]["line"] == "slag: refuse"
    assert answer["findings"][0]["reading"] == "leetspeak"
    assert len(httpx.get(f"{url}/inspect/safety").json()["decisions"]) == before
    wrong = httpx.post(f"{url}/inspect/safety/check", json={"text": "x", "surface": "training"})
    assert wrong.status_code == 400 and "checked by no guard" in wrong.json()["error"]["message"]


def test_a_red_teams_findings_are_shown_and_a_damaged_run_is_named(url):
    polite, torn = httpx.get(f"{url}/inspect/redteams").json()["runs"]
    assert polite["name"] == "polite" and polite["finished"] == polite["planned"] and "cannot be read" in torn["problem"]
    assert "Privacy" in httpx.get(f"{url}/inspect/redteams/polite").json()["html"]
    for name in ("nothing", "..", "torn"):
        assert httpx.get(f"{url}/inspect/redteams/{name}").status_code == 404


def test_a_server_without_a_guard_says_so():
    with servers() as start:
        url = start(FakeEngine(), web_pages(WebSettings()))
        assert httpx.get(f"{url}/inspect/safety").json()["policy"] is None
        assert httpx.post(f"{url}/inspect/safety/check", json={"text": "slag"}).status_code == 403
        assert httpx.get(f"{url}/inspect/redteams").status_code == 403


def test_the_page_shows_policy_decisions_a_tried_text_and_the_red_team(url, page):
    say(url, "What is slag?")
    page.goto(f"{url}/safety")
    page.wait_for_selector("#decisions td:has-text('policy.yaml:11')")
    assert "What is slag?" in page.inner_text("#decisions") and "talk of soot" in page.inner_text("#policy")
    page.fill("[name=text]", "<b>soot</b>")
    page.click("text=Ask the guard")
    page.wait_for_selector("#decided >> text=policy.yaml:9")
    page.wait_for_selector("#findings table")
    assert faults(page) == []
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
