"""A Modelfile for Ollama, beside a GGUF file: what it runs, how a conversation is written, and when an answer ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bessemer.core.store import read_json, write_text
from bessemer.model.folder_config import read_model_config
from bessemer.tokenization.chat_templates import template_name
from bessemer.tokenization.folder import TOKENIZER_CONFIG_FILE

#: Our templates in the language of Ollama, Go's `text/template`. The begin token is the file's own, which it adds itself.
_TEMPLATES = {
    "chatml": """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
""",
    "llama3": """{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>

{{ .Content }}<|eot_id|>{{ end }}<|start_header_id|>assistant<|end_header_id|>

""",
}
_STOPS = {"chatml": ("<|im_end|>",), "llama3": ("<|eot_id|>",)}
#: Names of generation settings, ours and Ollama's.
_PARAMETERS = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "repeat_penalty"}


def write_modelfile(folder: Path, gguf: Path) -> Path:
    """Write `NAME.Modelfile` beside a GGUF file that was made of a model's folder; its path.

    A template of ours is written out; of another one Ollama makes what it can of the file's own.
    """
    lines = [f"FROM ./{gguf.name}"]
    name = _template_name(folder)
    if name is not None:
        lines.append(f'TEMPLATE """{_TEMPLATES[name]}"""')
        lines += [f'PARAMETER stop "{stop}"' for stop in _STOPS[name]]
    lines.append(f"PARAMETER num_ctx {read_model_config(folder).max_position_embeddings}")
    settings: dict[str, Any] = {}
    if (path := folder / "generation_config.json").is_file():
        settings = read_json(path, "generation settings")
    lines += [f"PARAMETER {theirs} {settings[ours]}" for ours, theirs in _PARAMETERS.items() if settings.get(ours) is not None]
    out = gguf.with_suffix(".Modelfile")
    write_text(out, "\n".join(lines) + "\n")
    return out


def _template_name(folder: Path) -> str | None:
    """The template of a folder, where it is one of ours and Ollama can be told it."""
    beside, settings = folder / "chat_template.jinja", folder / TOKENIZER_CONFIG_FILE
    if beside.is_file():
        text = beside.read_text(encoding="utf-8")
    elif settings.is_file():
        text = read_json(settings, "tokenizer's settings").get("chat_template") or ""
    else:
        return None
    name = template_name(text)
    return name if name in _TEMPLATES else None
