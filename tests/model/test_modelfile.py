"""A Modelfile for Ollama: its template says what ours says."""

import json
import re

import pytest

from bessemer.model.formats.gguf_export import _STOPS, _TEMPLATES, write_modelfile
from bessemer.tokenization.chat_templates import CHAT_TEMPLATES
from tests.model.randomised import SHAPES

SAID = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How hot?"},
    {"role": "assistant", "content": "1538 °C"},
    {"role": "user", "content": "Sure?"},
]


def rendered(template: str) -> str:
    """What Go's `text/template` makes of a template with one range over the messages."""
    before, body, after = re.fullmatch(r"(.*?)\{\{- range \.Messages \}\}(.*)\{\{ end \}\}(.*)", template, re.DOTALL).groups()
    parts = (body.replace("{{ .Role }}", one["role"]).replace("{{ .Content }}", one["content"]) for one in SAID)
    return before.rstrip() + "".join(parts) + after


@pytest.mark.parametrize("name", _TEMPLATES)
def test_a_conversation_is_written_as_our_template_writes_it(name):
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    ours = environment.from_string(CHAT_TEMPLATES[name]).render(messages=SAID, add_generation_prompt=True, bos_token="<BOS>")
    assert rendered(_TEMPLATES[name]) == ours.removeprefix("<BOS>").removeprefix("<|endoftext|>")
    assert all(stop in ours for stop in _STOPS[name])


def test_the_file_names_the_model_its_stops_and_its_settings(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    config = SHAPES["grouped"].model_dump(mode="json") | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATES["chatml"]}), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_k": None}), encoding="utf-8")
    lines = write_modelfile(folder, tmp_path / "mine.gguf").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "FROM ./mine.gguf" and 'PARAMETER stop "<|im_end|>"' in lines
    assert "PARAMETER temperature 0.6" in lines and not any("top_k" in line for line in lines)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "another"}), encoding="utf-8")
    assert "TEMPLATE" not in write_modelfile(folder, tmp_path / "mine.gguf").read_text(encoding="utf-8")
