"""`bessemer recipes`."""

from __future__ import annotations

from typing import Annotated

import typer


def recipes(
    action: Annotated[str | None, typer.Argument(help="`show` prints one recipe.")] = None,
    name: Annotated[str | None, typer.Argument(help="The recipe to show: its name, or a .yaml file.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="With --full: KEY=VALUE …, as of `bessemer run`.")] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Show every setting, with the line of the file that it comes from, or its default.")
    ] = False,
) -> None:
    """List the recipes that ship with Bessemer, or show one."""
    from bessemer.core.errors import ConfigError
    from bessemer.core.yaml_file import read_yaml
    from bessemer.pipeline.recipe import find_recipe, load_recipe, shipped_recipes

    if action is None:
        found = shipped_recipes()
        width = max(map(len, found))
        for recipe, path in found.items():
            print(f"{recipe:<{width}}  {read_yaml(path).values.get('description', '')}")
        return
    if action != "show" or name is None:
        raise ConfigError("say `bessemer recipes`, or `bessemer recipes show NAME`")
    if full:
        from bessemer.pipeline.recipe_settings import recipe_settings

        # nothing of it is run
        for line in recipe_settings(load_recipe(name, overrides or [], allow_code=True)):
            print(line)
        return
    if overrides:
        raise ConfigError(f"{overrides[0]}: say --full, which shows the settings with overrides on top")
    print(find_recipe(name).read_text(encoding="utf-8"), end="")
