"""Data sets of the Hugging Face Hub by name: which files are which split, fetched into the hub's cache, read as tables.

A name is `hub:ORGANISATION/NAME`, optionally followed by `@REVISION` and by `#SPLIT`, `#CONFIGURATION/SPLIT` or
`#SPLIT[:1000]`. The files of a split are found as `datasets` finds them: by the list `configs` in the card, else by the names
of files and folders; only files of the most frequent form are read. A repository's script is never run; instead the hub's
converted files are read, from the branch `refs/convert/parquet`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from bessemer.core.config import nearest
from bessemer.core.environment import install_advice
from bessemer.core.errors import ArtefactError, ConfigError, SourceError
from bessemer.core.records import COMPRESSIONS, is_table

PREFIX = "hub:"
_NAME = re.compile(
    r"(?P<repository>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?"
    r"(?:#(?:(?P<configuration>[^/#\[\]]+)/)?(?P<split>[^/#\[\]]*)(?:\[(?P<begin>\d+%?)?:(?P<end>\d+%?)?\])?)?"
)
#: Branch with the hub's conversions to Parquet.
_CONVERTED = "refs/convert/parquet"
#: Split → words for it in names of files and folders.
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
#: `train-00000-of-00004.parquet`.
_SHARD = re.compile(r"(?P<split>\w+(?:[.-]\w+)*?)-\d{5}-of-\d{5}")
_DEFAULT = "default"
_CARD = "README.md"


@dataclass(frozen=True)
class HubDataset:
    """A data set of the hub, or a folder in its layout. split: empty where none is named. rows: (begin, end) of the wanted
    rows, as in a Python slice or in percent."""

    repository: str
    revision: str | None = None
    configuration: str | None = None
    split: str = ""
    rows: tuple[str | None, str | None] = (None, None)
    folder: Path | None = field(default=None)

    @classmethod
    def parse(cls, name: str) -> HubDataset:
        """The data set with a name. Raises ConfigError for a malformed name."""
        match = _NAME.fullmatch(name.removeprefix(PREFIX))
        if match is None:
            raise ConfigError(
                f"{name!r} is not the name of a data set of the hub; it is {PREFIX}ORGANISATION/NAME, and behind it @REVISION "
                "and #SPLIT, #CONFIGURATION/SPLIT or #SPLIT[:1000] where they are wanted"
            )
        rows = (match["begin"], match["end"])
        return cls(match["repository"], match["revision"], match["configuration"], match["split"] or "", rows)

    @classmethod
    def of_folder(cls, folder: Path) -> HubDataset:
        """A folder in the hub's layout, as a data set."""
        return cls(str(folder), folder=folder)

    def __str__(self) -> str:
        if self.folder is not None:
            return str(self.folder)
        configuration = f"{self.configuration}/" if self.configuration else ""
        begin, end = self.rows
        rows = f"[{begin or ''}:{end or ''}]" if begin or end else ""
        part = f"#{configuration}{self.split}{rows}" if configuration or self.split or rows else ""
        return f"{PREFIX}{self.repository}{f'@{self.revision}' if self.revision else ''}{part}"

    def commit(self) -> str:
        """The commit that is read, for a stage's key. Raises as `tables`."""
        return self._listing()[1]

    def tables(self) -> list[Path]:
        """The files of the split on this machine; missing ones are downloaded. Raises SourceError for an unknown data set,
        configuration or split, and where access is denied or the hub is unreachable; ArtefactError where the hub's package is
        missing.
        """
        if self.folder is not None:
            return self._of_folder(self.folder)
        files, _, revision = self._listing()
        card = self._fetched([_CARD])[0].read_text(encoding="utf-8") if _CARD in files else ""
        chosen = self.files(files, card)
        if not chosen and revision != _CONVERTED:
            return replace(self, revision=_CONVERTED).tables()
        return self._fetched(chosen)

    def _of_folder(self, folder: Path) -> list[Path]:
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        card = folder / _CARD
        chosen = self.files(names, card.read_text(encoding="utf-8") if card.is_file() else "")
        if not chosen:
            raise SourceError(f"{folder}: holds no table")
        return [folder / name for name in chosen]

    def files(self, names: Sequence[str], card: str = "") -> list[str]:
        """The files of the split among those of a repository; empty where it holds no tables. card: its README. Raises
        SourceError for an unknown configuration or split, and where one must be named.
        """
        splits = self._splits(names, _configurations(card))
        if not splits:
            return []
        known = ", ".join(splits)
        if not self.split:
            if len(splits) > 1 and "train" not in splits:
                raise SourceError(
                    f"{self}: has the splits {known}; name one, as {PREFIX}{self.repository}#{next(iter(splits))}"
                )
            return splits.get("train") or next(iter(splits.values()))
        chosen: list[str] = []
        for name in self.split.split("+"):
            if name not in splits:
                raise SourceError(f"{self}: has no split {name!r}{nearest(name, list(splits))}")
            chosen += splits[name]
        return chosen

    def _splits(self, names: Sequence[str], configurations: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
        """Split → its files, in the named or the default configuration."""
        if configurations:
            wanted = self.configuration or _default(configurations)
            if wanted is None or wanted not in configurations:
                said = f"has no configuration {wanted!r}" if wanted else "has several configurations"
                known = ", ".join(configurations)
                raise SourceError(
                    f"{self}: {said}; name one of {known}, as {PREFIX}{self.repository}#{next(iter(configurations))}/train"
                )
            return _named_splits(names, configurations[wanted])
        # the branch of converted files has a folder for each configuration
        folders = dict.fromkeys(PurePosixPath(name).parts[0] for name in names if len(PurePosixPath(name).parts) == 3)
        if self.revision == _CONVERTED and folders:
            wanted = self.configuration or (next(iter(folders)) if len(folders) == 1 else _DEFAULT)
            if wanted not in folders:
                raise SourceError(
                    f"{self}: has several configurations; name one of {', '.join(folders)}, as "
                    f"{PREFIX}{self.repository}#{next(iter(folders))}/train"
                )
            within = [name for name in names if name.startswith(f"{wanted}/")]
            splits: dict[str, list[str]] = {}
            for name in sorted(within):
                splits.setdefault(PurePosixPath(name).parts[1].removeprefix("partial-"), []).append(name)
            return splits
        if self.configuration is not None:
            # without a card, a folder serves as the configuration
            names = [name for name in names if name.startswith(f"{self.configuration}/")]
            if not names:
                raise SourceError(f"{self}: has no configuration and no folder {self.configuration!r}")
        return splits_by_name(names)

    def wanted(self, count: int) -> slice:
        """The wanted rows among the `count` of a split."""
        begin, end = (_position(text, count) for text in self.rows)
        return slice(begin, end)

    def _listing(self) -> tuple[list[str], str, str | None]:
        """(files, commit, revision) of the repository; from the cache where the hub is unreachable."""
        hub = _library()
        info = _asked(self, lambda: hub.HfApi().dataset_info(self.repository, revision=self.revision, timeout=20))
        if info is None:
            folder = Path(self._snapshot(hub, local_files_only=True, allow_patterns=[_CARD]))
            return (
                sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()),
                folder.name,
                None,
            )
        return sorted(one.rfilename for one in info.siblings or ()), str(info.sha), self.revision

    def _snapshot(self, hub: Any, **options: Any) -> str:
        return str(
            _asked(
                self,
                lambda: hub.snapshot_download(self.repository, repo_type="dataset", **{"revision": self.revision, **options}),
                is_last=True,
            )
        )

    def _fetched(self, names: Sequence[str]) -> list[Path]:
        """Files of the revision in the hub's cache. They are requested by the revision's name, so that later runs find them
        without the hub."""
        folder = Path(self._snapshot(_library(), allow_patterns=list(names)))
        files = [folder / name for name in names]
        if (missing := next((name for name, file in zip(names, files, strict=True) if not file.exists()), None)) is not None:
            raise SourceError(f"{self}: {missing} is not in the hub's cache, and the hub cannot be reached")
        return files


def is_hub_dataset(name: str) -> bool:
    """Whether a name of `data` is that of a data set of the hub."""
    return name.startswith(PREFIX)


def looks_like_hub_dataset(name: str) -> bool:
    """Whether a name without the prefix could be ORGANISATION/NAME of the hub, and not the path of a table."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?(#.*)?", name)) and not is_table(name.partition("#")[0])


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise ArtefactError(install_advice("huggingface_hub")) from None
    return huggingface_hub


def _asked(dataset: HubDataset, ask: Callable[[], Any], *, is_last: bool = False) -> Any:
    """The hub's response; None where it is unreachable and the cache may have the data set. Raises SourceError, which says what
    to do."""
    from huggingface_hub import errors

    name = str(dataset)
    try:
        return ask()
    except errors.GatedRepoError:
        raise SourceError(
            f"{name}: its makers want their terms accepted: do so on huggingface.co/datasets/{dataset.repository}, then "
            "`hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise SourceError(f"{name}: the hub has no such data set, or it is private (`hf auth login`)") from None
    except errors.RevisionNotFoundError:
        raise SourceError(f"{name}: the data set has no revision {dataset.revision!r}, or holds no table") from None
    except errors.HFValidationError as error:
        raise SourceError(f"{name}: not the name of a data set on the hub ({error})") from None
    except Exception as error:  # networks fail in many ways, and the library's versions raise different errors
        kind = type(error)
        is_network = isinstance(error, (OSError, errors.HfHubHTTPError)) or kind.__module__.startswith(
            ("httpx", "httpcore", "requests")
        )
        if not is_network:
            raise
        if not is_last:
            return None
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), kind.__name__)
        raise SourceError(
            f"{name}: neither in the hub's cache nor can the hub be reached ({why}); fetch it where there is a network, or "
            "name a file"
        ) from None


def _position(text: str | None, count: int) -> int | None:
    """A bound of a slice: a number of rows, or a share of all in percent."""
    if text is None:
        return None
    return round(count * int(text[:-1]) / 100) if text.endswith("%") else int(text)


def _configurations(card: str) -> dict[str, Mapping[str, Any]]:
    """The configurations that a card lists, by name. Raises SourceError for a card whose head is no YAML."""
    if not card.startswith("---"):
        return {}
    from bessemer.core.yaml_file import parse_yaml

    head = card[3:].partition("\n---")[0]
    try:
        values = parse_yaml(head, _CARD).values
    except ConfigError as error:
        raise SourceError(f"the card of the data set cannot be read: {error}") from None
    listed = values.get("configs") if isinstance(values, Mapping) else None
    given = [one for one in listed or () if isinstance(one, Mapping) and ("data_files" in one or "data_dir" in one)]
    return {str(one.get("config_name", _DEFAULT)): one for one in given}


def _default(configurations: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The configuration that applies where none is named."""
    if len(configurations) == 1 or _DEFAULT in configurations:
        return _DEFAULT if _DEFAULT in configurations else next(iter(configurations))
    return next((name for name, one in configurations.items() if one.get("default")), None)


def _named_splits(names: Sequence[str], configuration: Mapping[str, Any]) -> dict[str, list[str]]:
    """Split → files, by the patterns of a configuration of the card."""
    folder = str(configuration.get("data_dir", "")).strip("/")
    within = [name for name in names if not folder or name.startswith(f"{folder}/")]
    given = configuration.get("data_files")
    if given is None:
        return splits_by_name(within)
    patterns: dict[str, list[str]] = {}
    for one in [given] if isinstance(given, (str, Mapping)) else given:
        split, path = (str(one.get("split", "train")), one.get("path")) if isinstance(one, Mapping) else ("train", one)
        patterns.setdefault(split, []).extend([path] if isinstance(path, str) else path or ())
    splits = {}
    for split, of_split in patterns.items():
        matching = [name for pattern in of_split for name in within if _matches(name, pattern, folder)]
        splits[split] = _of_one_form(dict.fromkeys(matching))
    return {split: files for split, files in splits.items() if files}


def _matches(name: str, pattern: str, folder: str) -> bool:
    whole = f"{folder}/{pattern}" if folder else pattern
    # ** stands for any number of folders, also for none
    return fnmatch(name, whole) or ("**/" in whole and fnmatch(name, whole.replace("**/", "")))


def splits_by_name(names: Sequence[str]) -> dict[str, list[str]]:
    """Split → files, by the names of shards in `data`, of folders, or of files; without such names all are `train`."""
    tables = _of_one_form(name for name in names if not any(part.startswith((".", "__")) for part in PurePosixPath(name).parts))
    splits: dict[str, list[str]] = {}
    for name in tables:
        if name.startswith("data/") and (match := _SHARD.match(PurePosixPath(name).name)):
            splits.setdefault(match["split"], []).append(name)
    if splits:
        return splits
    for told in (lambda name: PurePosixPath(name).parts[:-1], lambda name: [PurePosixPath(name).name]):
        found = {split: [name for name in tables if any(_tells(part, split) for part in told(name))] for split in _WORDS}
        if any(found.values()):
            return {split: files for split, files in found.items() if files}
    return {"train": tables} if tables else {}


def _tells(part: str, split: str) -> bool:
    """Whether a part of a path has one of the words for a split between separators."""
    words = re.split(r"[-._ 0-9]+", part.lower())
    return any(word in words for word in _WORDS[split])


#: Files that describe tables and are none.
_ABOUT = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "config.json")


def _of_one_form(names: Iterable[str]) -> list[str]:
    """Those tables among the files that have the most frequent form, in order."""
    tables = [name for name in names if is_table(name) and PurePosixPath(name).name not in _ABOUT]
    forms = Counter(map(_form, tables))
    commonest = max(forms, key=lambda form: forms[form], default="")
    return [name for name in tables if _form(name) == commonest]


def _form(name: str) -> str:
    """The suffix of a table without the suffix of a compression."""
    return next((suffix for suffix in reversed(PurePosixPath(name).suffixes) if suffix not in COMPRESSIONS), "")
