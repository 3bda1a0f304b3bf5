"""`bessemer guard`: what the guard of a policy does about a text, and by which rule."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from bessemer.safety.config import GuardConfig

#: Findings that are shown.
_SHOWN = 5


def guard(
    texts: Annotated[list[str], typer.Argument(help="Texts; - reads one from the standard input.")],
    policy: Annotated[Path | None, typer.Option(help="YAML file of a policy; Bessemer's own without it.")] = None,
    surface: Annotated[str, typer.Option(help="Where the text is: prompt, answer, document, tool or call.")] = "prompt",
    guard_model: Annotated[
        str | None, typer.Option(help="FORM=URL of a guard model: llama_guard_3, llama_guard_4, qwen3guard, gpt_oss_safeguard.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each text.")] = False,
) -> None:
    """Say what a policy does about texts at a surface, and which rule decided."""
    from bessemer.core.config import nearest
    from bessemer.core.errors import ConfigError
    from bessemer.core.policy import PolicyLines, read_policy
    from bessemer.safety.findings import SURFACES
    from bessemer.safety.guard import Guard

    if surface not in SURFACES:
        raise ConfigError(f"--surface {surface}: one of {', '.join(SURFACES)}{nearest(surface, list(SURFACES))}")
    checker, lines = Guard(read_policy(policy), guard_config(guard_model, None)), PolicyLines.read(policy)
    for given in texts:
        text = _standard_input() if given == "-" else given
        decision, findings = checker.check(text, surface), checker.findings(text, surface)
        place, line = ("", "") if decision.finding is None else lines.of(surface, decision.finding.category)
        if as_json:
            found = [{"category": one.category, "score": one.score, "rail": one.rail, "rule": one.rule} for one in findings]
            said = {"action": decision.action, "reason": decision.reason, "place": place, "findings": found}
            print(json.dumps(said, ensure_ascii=False))
            continue
        print(f"{decision.action} · {decision.reason}")
        if place:
            print(f"  {place}: {line}")
        for one in findings[:_SHOWN]:
            read = "" if one.reading == "plain" else f", read as {one.reading}"
            print(f"  {one.score:.2f} {one.category} · {one.rail}: {one.rule}{read}")


def guard_config(model: str | None, audit: Path | None, audit_content: bool = False) -> GuardConfig:
    """The settings of the options. Raises ConfigError for a guard model that is not FORM=URL."""
    from bessemer.core.errors import ConfigError
    from bessemer.safety.config import GuardConfig

    values: dict[str, Any] = {"audit_content": audit_content} | ({} if audit is None else {"audit": str(audit)})
    if model is not None:
        form, separator, url = model.partition("=")
        if not separator:
            raise ConfigError(f"--guard-model {model}: give FORM=URL, as qwen3guard=http://127.0.0.1:8001/v1")
        values |= {"rails": ["rules", "words", "classifier", "model"], "model_form": form, "model_url": url}
    return GuardConfig.parse(values, "--guard-model")


def _standard_input() -> str:
    from bessemer.core.errors import SourceError

    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"-: is not UTF-8 text (byte {error.start})") from None
