"""A policy: what an assistant is to do and not to do, in one YAML file that tuning, serving and tests read.

    format: 1
    name: shop
    categories: {privacy: {code: S7, meaning: finding or exposing private information}}
    principles:
      privacy:
        critique: Does the answer expose something private of a person?
        revision: Leave out what is private, and say why.
        comparison: Which answer respects the privacy of people more?
    surfaces:
      answer: {otherwise: allow, categories: {privacy: refuse}}

A *category* is a kind of content that detectors know, a *principle* is what an answer is criticised, revised and compared by,
and a *surface* is a place where text enters or leaves, with what is done about each category there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import StringConstraints, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from bessemer.core.config import Config, nearest, setting
from bessemer.core.errors import ConfigError
from bessemer.core.yaml_file import read_yaml

#: What happens to a text of a category: nothing, an entry in the log, or it goes no further.
Action = Literal["allow", "log", "refuse"]
SurfaceName = Literal["prompt", "answer", "document", "tool"]

_Name: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]


class Category(Config):
    """A kind of content that detectors know."""

    code: str = setting("", "its number in a published list, such as S1 of MLCommons")
    meaning: str = setting(description="what it is about, in one line", min_length=1)
    limit: float = setting(0.6, "lowest score of a detector at which a text is of it", gt=0, le=1)


class Principle(Config):
    """What answers are criticised, revised and compared by, as it is said to a model."""

    critique: str = setting(description="what of an answer is to be criticised", min_length=1)
    revision: str = setting(description="how the answer is to be written anew", min_length=1)
    comparison: str = setting(description="a question that tells the better of two answers: Which answer …?", min_length=1)
    weight: float = setting(1.0, "how often it is drawn, beside the other weights", gt=0, allow_inf_nan=False)


class Surface(Config):
    """What is done about texts at one place."""

    otherwise: Action = setting("allow", "what is done about categories that are not named: allow, log or refuse")
    categories: dict[str, Action] = setting(default_factory=dict, description="what is done, by category")

    def action(self, category: str) -> Action:
        """What is done about a category."""
        return self.categories.get(category, self.otherwise)


class Surfaces(Config):
    """The places where text enters and leaves."""

    prompt: Surface = setting(default_factory=Surface, description="what a user says")
    answer: Surface = setting(default_factory=Surface, description="what the assistant says")
    document: Surface = setting(default_factory=Surface, description="what is looked up for it")
    tool: Surface = setting(default_factory=Surface, description="what its tools return")


class Policy(Config):
    """A whole policy."""

    format: Literal[1] = setting(description="format of the file")
    name: str = setting(description="name of the policy", min_length=1)
    categories: dict[_Name, Category] = setting(description="kinds of content, by name", min_length=1)
    principles: dict[_Name, Principle] = setting(description="principles, by name", min_length=1)
    surfaces: Surfaces = setting(default_factory=Surfaces, description="what is done where")

    @model_validator(mode="after")
    def _known_categories(self) -> Self:
        for surface, settings in self._surfaces():
            for name in settings.categories:
                if name not in self.categories:
                    message = f"there is no category {name!r}{nearest(name, list(self.categories))}"
                    # pydantic formats the message: given as a variable, braces in it stay as they are
                    error = PydanticCustomError("value_error", "{message}", {"message": message})
                    place = ("surfaces", surface, "categories", name)
                    raise ValidationError.from_exception_data("Policy", [InitErrorDetails(type=error, loc=place, input=name)])
        return self

    def _surfaces(self) -> Iterator[tuple[str, Surface]]:
        for name in Surfaces.model_fields:
            yield name, getattr(self.surfaces, name)

    def action(self, surface: SurfaceName, category: str) -> Action:
        """What is done at a surface about a category."""
        settings: Surface = getattr(self.surfaces, surface)
        return settings.action(category)

    def acted_on(self, surface: SurfaceName) -> dict[str, Category]:
        """The categories that a surface logs or refuses, by name."""
        return {name: category for name, category in self.categories.items() if self.action(surface, name) != "allow"}

    def chosen_principles(self, names: Sequence[str] = ()) -> Mapping[str, Principle]:
        """The principles of these names, all of them where none is named. Raises ConfigError for one that is not there."""
        for name in names:
            if name not in self.principles:
                raise ConfigError(f"the policy {self.name!r} has no principle {name!r}{nearest(name, list(self.principles))}")
        return {name: self.principles[name] for name in names or self.principles}


def default_policy_path() -> Path:
    """The path of the default policy."""
    return Path(str(resources.files("bessemer.core") / "default_policy.yaml"))


def read_policy(path: Path | None = None) -> Policy:
    """The policy of a YAML file, or the default policy.

    Raises ConfigError, in one line with file and line, for a file that cannot be read, an unknown key, a value that is not
    allowed, and a surface with an unknown category.
    """
    placed = read_yaml(path or default_policy_path())
    return Policy.parse(placed.values, lambda key: placed.where((), key))
