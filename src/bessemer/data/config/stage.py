"""Settings that every data stage has: where it runs, and where its documents lie."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from bessemer.core.config import Config, nearest, setting
from bessemer.core.errors import ConfigError
from bessemer.core.object_storage import ObjectPath
from bessemer.core.registry import Registry
from bessemer.core.usercode import is_user_function
from bessemer.data.engine import Engine


def check_plugins(registry: Registry[Any], names: list[str], *, user_functions: bool = True) -> list[str]:
    """The names, when a recipe may use each: a plugin's, or where allowed a `file.py:function`. Raises ValueError otherwise."""
    for name in names:
        if name not in registry and not (user_functions and is_user_function(name)):
            raise ValueError(f"unknown {registry.kind} {name!r}{nearest(name, list(registry))}")
    return names


class DataConfig(Config):
    """What every data stage may say about where it runs; nothing of it can change the output."""

    engine: Literal["local", "ray"] = setting(
        "local",
        "`local` (this machine's cores) or `ray` (a cluster, whose workers need Bessemer with the extra `data`)",
        affects_output=False,
    )
    ray_address: str | None = setting(
        None, "the cluster: `auto` or `ray://host:10001`; a new one on this machine when absent", affects_output=False
    )
    processes: bool = setting(
        False, "`local`: processes instead of threads, faster where filters are written in Python", affects_output=False
    )

    storage: str | None = setting(
        None,
        "`s3://bucket/folder` (`gs://`, `az://`): where the documents are put instead of into the run's folder, by the workers "
        "themselves, which then need no disk in common",
        affects_output=False,
    )

    @field_validator("storage")
    @classmethod
    def _an_address(cls, value: str | None) -> str | None:
        try:
            return value and str(ObjectPath.parse(value))
        except ConfigError as error:
            raise ValueError(str(error)) from None

    def where(self) -> Engine:
        """The engine that these settings describe."""
        return Engine(self.engine, self.ray_address, self.processes)
