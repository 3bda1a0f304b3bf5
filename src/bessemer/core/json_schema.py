"""JSON schema: whether a value fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bessemer.core.environment import install_advice
from bessemer.core.errors import ConfigError

#: Why a value does not fit, in one line; None where it fits.
SchemaCheck = Callable[[Any], str | None]

_LONGEST = 300


def schema_check(schema: Any, whose: str) -> SchemaCheck:
    """The check of a schema. whose: named in messages.

    References may point into the schema itself only: nothing is fetched. Raises ConfigError without the package `jsonschema`,
    and for an invalid schema.
    """
    try:
        import jsonschema
        import referencing
        import referencing.exceptions
    except ImportError:
        raise ConfigError(f"{whose}: {install_advice('jsonschema')}") from None
    kind = jsonschema.validators.validator_for(schema)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ConfigError(f"{whose}: the schema is not valid: {error.message}") from None
    validator = kind(schema, registry=referencing.Registry())

    def check(value: Any) -> str | None:
        try:
            error = jsonschema.exceptions.best_match(validator.iter_errors(value))
        except referencing.exceptions.Unresolvable as unresolvable:
            return f"the schema refers to {unresolvable.ref!r}, which is not in it"
        if error is None:
            return None
        reason = " ".join(f"{error.json_path}: {error.message}".split())
        return reason if len(reason) <= _LONGEST else f"{reason[: _LONGEST - 1]}…"

    return check
