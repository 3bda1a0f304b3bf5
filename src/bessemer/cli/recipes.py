"""`bessemer recipes`."""

from __future__ import annotations

from typing import Annotated

import typer


def recipes(
    action: Annotated[str | None, typer.Argument(help="`show` prints one recipe.")] = None,
    name: Annotated[str | None, typer.Argument(help="The recipe to show.")] = None,
) -> None:
    """List the recipes that ship with Bessemer, or show one."""
    from bessemer.core.errors import ConfigError
    from bessemer.core.yaml_file import read_yaml
    from bessemer.pipeline.recipe import find_recipe, shipped_recipes

    if action is None:
        found = shipped_recipes()
        width = max(map(len, found))
        for recipe, path in found.items():
            print(f"{recipe:<{width}}  {read_yaml(path).values.get('description', '')}")
        return
    if action != "show" or name is None:
        raise ConfigError("say `bessemer recipes`, or `bessemer recipes show NAME`")
    print(find_recipe(name).read_text(encoding="utf-8"), end="")
