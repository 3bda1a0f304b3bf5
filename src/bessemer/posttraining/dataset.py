"""Files of examples: read with a parser of rows, and split into training and held-out ones."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from bessemer.core.errors import RequestError, SourceError
from bessemer.core.hashing import hash_file, hash_value
from bessemer.core.records import read_records
from bessemer.core.seeds import derive_seed
from bessemer.posttraining.formats import Turns

Example = TypeVar("Example")


def read_examples(path: Path, parse: Callable[[Mapping[str, Any]], Example]) -> list[Example]:
    """The rows of a file as examples. Raises SourceError with the file and the line of the first that is malformed."""
    examples = []
    for record in read_records(path):
        try:
            examples.append(parse(record.values))
        except (ValueError, RecursionError, RequestError) as error:
            raise SourceError(f"{record.place}: {error}") from None
    return examples


def prompt_key(prompt: Turns) -> str:
    """Hash of a prompt, by which examples of one prompt are kept together."""
    return hash_value(prompt if isinstance(prompt, str) else [dict(message) for message in prompt])


def split_examples(
    examples: Sequence[Example], together: Callable[[Example], Hashable], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """(training, held out): about `share` of what is told apart by `together`, which puts examples on the same side."""
    training: list[Example] = []
    held_out: list[Example] = []
    for example in examples:
        chance = derive_seed(seed, "validation", hash_value(together(example))) / 2**63
        (held_out if chance < share else training).append(example)
    return training, held_out


def files_fingerprint(names: Sequence[str], folder: Path) -> dict[str, str]:
    """Hashes of files, for a stage's key. Raises SourceError for a missing one."""
    for name in names:
        if not (folder / name).is_file():
            raise SourceError(f"{folder / name}: there is no such file")
    return {name: hash_file(folder / name) for name in names}
