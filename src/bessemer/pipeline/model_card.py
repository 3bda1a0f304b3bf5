"""Card of a run's model: what it is, how it was made, what was measured of it, and what nobody measured.

Markdown with the heading that model hubs read (`README.md`). It follows from the run's manifests alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bessemer.core.errors import ArtefactError
from bessemer.core.store import MANIFEST, read_json
from bessemer.pipeline.report import key_figures, run_report
from bessemer.pipeline.run_folder import RunFolder, StageState, stage_states
from bessemer.safety.redteam.report import verdict_sentence

#: Entries of `config.json` that a reader looks for, with their names.
_SHAPE = {
    "model_type": "family",
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "num_attention_heads": "query heads",
    "num_key_value_heads": "key-value heads",
    "max_position_embeddings": "context (tokens)",
    "vocab_size": "vocabulary",
}


def model_card(run: RunFolder) -> str:
    """The card of the model that a run ended with. Raises ArtefactError where no stage has made one."""
    states = [state for state in stage_states(run) if state.status == "done" and state.folder is not None]
    makers = [state for state in states if (_folder(state) / "model" / "config.json").is_file()]
    if not makers:
        raise ArtefactError(f"{run.name}: no stage of this run has made a model, so there is nothing to write a card of")
    maker, record = makers[-1], run.record()
    config = read_json(_folder(maker) / "model" / "config.json", "model's config")
    lines = ["---", "pipeline_tag: text-generation", "tags:", "- bessemer", "---", "", f"# {run.name}", ""]
    if description := record["recipe"].get("description"):
        lines += [str(description), ""]
    known = [(label, config[key]) for key, label in _SHAPE.items() if config.get(key)]
    shape = [f"{label} {value:,}" if isinstance(value, int) else f"{label} {value}" for label, value in known]
    lines += [f"The model of the stage `{maker.name}`, key `{maker.key}`: {', '.join(shape)}.", "", "## How it was made", ""]
    lines += ["| stage | key | what it made |", "|---|---|---|"]
    lines += [f"| `{state.name}` | `{state.key}` | {_cell(state.summary)} |" for state in states]
    lines += ["", "The recipe:", "", "```json", json.dumps(record["recipe"], indent=1, ensure_ascii=False), "```", ""]
    if any((_folder(state) / "documents").is_dir() for state in states):
        lines += [f"What it read: `bessemer show {run.name} --card` writes the card of its corpus.", ""]
    lines += ["## Measured", ""]
    figures = key_figures(run_report(run))
    lines += [f"- {one.label}: {one.value}{f' ({one.note})' if one.note else ''}" for one in figures] or [
        "Nothing was measured."
    ]
    return "\n".join([*lines, "", "## Safety", "", *_safety(states)]) + "\n"


def _safety(states: list[StageState]) -> list[str]:
    """Which policies stages read, what a red team found, and that nothing else is known."""
    metrics = {state.name: read_json(_folder(state) / MANIFEST, "manifest")["metrics"] for state in states}
    lines = [
        f"- The stage `{name}` kept to the policy {policy}."
        for name, of in metrics.items()
        if (policy := _policy(of)) is not None
    ]
    attacked = [state for state in states if state.kind == "redteam"]
    lines += [f"- A red team attacked it (`{state.name}`): {verdict_sentence(metrics[state.name])}" for state in attacked]
    if not attacked:
        lines.append("- No red team has attacked it: what it does when it is asked for harm is not known.")
    return [*lines, "- No guard is part of these weights; `bessemer serve --policy` puts one before them."]


def _policy(metrics: Mapping[str, Any]) -> str | None:
    policy = metrics.get("policy")
    if isinstance(policy, Mapping) and "hash" in policy:
        return f"{policy.get('name', '')} `{str(policy['hash'])[:12]}`".strip()
    return f"`{policy[:12]}`" if isinstance(policy, str) else None


def _folder(state: StageState) -> Path:
    assert state.folder is not None, "a finished stage has a folder"
    return state.folder


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
