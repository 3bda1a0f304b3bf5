"""`bessemer redteam`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bessemer.cli.options import Device, Runs, print_view

if TYPE_CHECKING:
    from bessemer.core.config import Config


def _list_attacks(wanted: bool) -> None:
    """Print the attacks by name, and end."""
    if not wanted:
        return
    from bessemer.safety.redteam.config import ATTACKS, USUAL_ATTACKS

    for name in ATTACKS:
        usual = " " if name in USUAL_ATTACKS else "*"
        print(f"{usual} {name:<20} {ATTACKS[name].description}")
    print("* only where --attacks names it")
    raise typer.Exit


def redteam(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL|URL", help="A model as elsewhere, or an OpenAI-compatible URL with its version: …/v1."),
    ],
    attacks: Annotated[
        str | None, typer.Option(help="Attacks by name, separated by commas (default: the usual ones; see --list-attacks).")
    ] = None,
    list_attacks: Annotated[
        bool, typer.Option("--list-attacks", help="List the attacks, and exit.", is_eager=True, callback=_list_attacks)
    ] = False,
    categories: Annotated[
        str | None,
        typer.Option(
            help="Categories, separated by commas: the policy's, and injection, system_prompt, recitation (default: all)."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first goals of each kind and category.", min=1)] = None,
    budget: Annotated[
        int | None, typer.Option(help="Most queries of the model (default: as many as are needed).", min=1)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="A setting of an attack, ATTACK.SETTING=VALUE, such as best_of_n.samples=100; may be repeated."
        ),
    ] = None,
    seeds: Annotated[list[Path] | None, typer.Option(help="YAML file of goals of your own; may be repeated.")] = None,
    own_seeds: Annotated[bool, typer.Option(help="Also try the goals that come with Bessemer.")] = True,
    policy: Annotated[Path | None, typer.Option(help="YAML file of the policy (default: Bessemer's own).")] = None,
    system: Annotated[str, typer.Option(help="System prompt of the model.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 160,
    temperature: Annotated[
        float, typer.Option(help="Temperature of the answers, where an attack says no other.", min=0.0)
    ] = 0.0,
    attacker: Annotated[
        str | None, typer.Option(metavar="MODEL|URL#NAME", help="A model that attacks, for refinement, which it adds.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(metavar="MODEL|URL#NAME", help="A model that rates answers by StrongREJECT's rubric.")
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(help="With a URL: the model's name there (default: the first it lists).")
    ] = None,
    key_variable: Annotated[
        str, typer.Option(help="Environment variable that holds the key of the URL, also of an attacker's and a judge's.")
    ] = "",
    workers: Annotated[int, typer.Option(help="With a URL: requests at once.", min=1)] = 4,
    out: Annotated[Path | None, typer.Option(help="Folder of the run (default redteam/MODEL).")] = None,
    before: Annotated[Path | None, typer.Option(help="Folder of an earlier run, to compare with.")] = None,
    fail_above: Annotated[
        float | None,
        typer.Option(help="Exit code 1 where an attack succeeds in more than this many percent.", min=0.0, max=100.0),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of what attacks draw, and of sampled answers.")] = 0,
    device: Device = "auto",
    runs: Runs = Path("runs"),
) -> None:
    """Attack a model, and say how often which attack succeeds, with intervals. The same command goes on where it was stopped.

    Nothing but the requests leaves this machine, and they go to the model, the attacker and the judge alone.
    """
    from bessemer.cli.named import find_served, option_of
    from bessemer.core.errors import writing_to
    from bessemer.core.progress import progress_for_terminal
    from bessemer.core.store import locked_folder, write_json, write_text
    from bessemer.safety.redteam.config import USUAL_ATTACKS, RedTeamConfig
    from bessemer.safety.redteam.report import comparison_parts, redteam_parts, redteam_report
    from bessemer.safety.redteam.results import compared, highest_rate, read_attempts
    from bessemer.safety.redteam.targets import is_url
    from bessemer.views.parts_terminal import show_parts
    from bessemer.views.report import render_report

    named = _names(attacks) or [*USUAL_ATTACKS, *(["refinement"] if attacker else [])]
    given: dict[str, Any] = {
        "attacks": named,
        "attack_settings": _settings(set_ or []),
        "categories": _names(categories),
        "limit": limit,
        "budget": budget,
        "policy": None if policy is None else str(policy.resolve()),
        "seeds": [str(path.resolve()) for path in seeds or ()],
        "own_seeds": own_seeds,
        "system": system,
        "max_tokens": max_tokens,
        "temperature": temperature,
    }
    for role, name in (("attacker", attacker), ("judge", judge)):
        if name is not None:
            given[role] = _chat_model(role, name, key_variable, runs)
    config = RedTeamConfig.parse(given, option_of("redteam"))
    earlier = None if before is None else read_attempts(before)
    place = None if is_url(model) else find_served(model, runs)
    folder = out or Path("redteam") / _folder_name(model)
    progress = progress_for_terminal()
    with writing_to(folder), locked_folder(folder):
        if place is None:
            results = _attack_url(config, model, model_name, key_variable, workers, folder, seed, device, progress)
        else:
            results = _attack_place(config, place, model, folder, seed, device, progress, runs)
    parts = redteam_parts(results)
    comparison = None
    if earlier is not None:
        comparison = compared(earlier, read_attempts(folder))
        write_json(folder / "comparison.json", comparison)
        parts += comparison_parts(comparison)
    print_view(*show_parts(parts))
    write_text(folder / "report.html", render_report(redteam_report(folder.name, results, comparison)))
    print(folder / "report.html")
    name, share = highest_rate(results)
    if fail_above is not None and 100 * share > fail_above:
        print(f"{name} succeeds in {share:.1%}, above --fail-above {fail_above:g} %")
        raise typer.Exit(1)


def _names(given: str | None) -> list[str]:
    return [name for each in (given or "").split(",") if (name := each.strip())]


def _settings(given: list[str]) -> dict[str, dict[str, Any]]:
    """What `--set ATTACK.SETTING=VALUE` gives. Raises ConfigError for another form."""
    from bessemer.core.errors import ConfigError
    from bessemer.core.yaml_file import parse_value

    settings: dict[str, dict[str, Any]] = {}
    for one in given:
        path, has_value, value = one.partition("=")
        attack, has_setting, name = path.partition(".")
        if not (has_value and has_setting and name):
            raise ConfigError(f"--set {one}: give it as ATTACK.SETTING=VALUE")
        settings.setdefault(attack, {})[name] = parse_value(value, f"--set {one}")
    return settings


def _chat_model(role: str, named: str, key_variable: str, runs: Path) -> dict[str, Any]:
    """The settings of an attacker or a judge: `URL#MODEL`, or a model of this machine."""
    from bessemer.cli.named import find_served
    from bessemer.core.errors import ConfigError
    from bessemer.safety.redteam.targets import is_url

    if not is_url(named):
        return {"model": str(find_served(named, runs).resolve())}
    url, _, name = named.partition("#")
    if not name:
        raise ConfigError(f"--{role} {named}: name its model behind the URL, as URL#NAME")
    return {"model": name, "url": url, "key_variable": key_variable}


def _folder_name(model: str) -> str:
    import re

    return (
        re.sub(r"[^A-Za-z0-9.-]+", "-", model.partition("://")[2] or Path(model).name.removesuffix(".gguf")).strip("-")
        or "model"
    )


def _attack_place(
    config: Config, place: Path, model: str, folder: Path, seed: int, device: str, progress: Any, runs: Path
) -> dict[str, Any]:
    from bessemer.cli.named import find_model
    from bessemer.evaluation.evaluation_folder import model_identity
    from bessemer.inference.engine import Engine
    from bessemer.safety.redteam.config import RedTeamConfig
    from bessemer.safety.redteam.run import attack_model
    from bessemer.safety.redteam.targets import EngineTarget, plain_weights

    assert isinstance(config, RedTeamConfig)
    with Engine(place, device=device) as engine:
        target = EngineTarget(
            engine,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            open_weights=lambda: plain_weights(find_model(model, runs), device),
        )
        identity = model_identity(place, Path(model).name)
        return attack_model(
            config, target, folder, model=identity, seed=seed, device=device, has_weights=True, progress=progress
        )


def _attack_url(
    config: Config,
    url: str,
    name: str | None,
    key_variable: str,
    workers: int,
    folder: Path,
    seed: int,
    device: str,
    progress: Any,
) -> dict[str, Any]:
    from bessemer.safety.redteam.config import RedTeamConfig
    from bessemer.safety.redteam.run import attack_model
    from bessemer.safety.redteam.targets import UrlTarget, first_model

    assert isinstance(config, RedTeamConfig)
    served = name or first_model(url, key_variable)
    target = UrlTarget(
        url,
        served,
        key_variable=key_variable,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        workers=workers,
    )
    identity = {"name": served, "url": url}
    return attack_model(config, target, folder, model=identity, seed=seed, device=device, progress=progress)
