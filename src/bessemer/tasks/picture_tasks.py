"""Published questions about pictures, read from files of the user's: MMMU, ChartQA, DocVQA, POPE.

Each is read in the forms in which it is published, and scored as its own evaluation does (`picture_scores.py`). The pictures
stay in their files (`picture_files.py`).
"""

from __future__ import annotations

import ast
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from string import ascii_uppercase
from typing import Any, ClassVar, Generic, Literal, TypeVar

from bessemer.core.config import setting
from bessemer.core.errors import ConfigError
from bessemer.core.records import Record
from bessemer.tasks.config import SampledConfig
from bessemer.tasks.picture_files import DataFile, StoredPicture, find_files, picture_records
from bessemer.tasks.picture_scores import anls, answers_right, chosen_option, detection_scores, relaxed_match, says_yes
from bessemer.tasks.questions import Context, GenerationQuestion, GenerationTask, Outcome

_SHORTLY = "Answer the question using a single word or phrase."


class PictureTaskConfig(SampledConfig):
    """Questions about pictures of a user's files; asked by the model's chat template."""

    data: str | list[str] = setting(
        description="file of the rows, folder or pattern (`**/val*.parquet`), in the folder of the data or beside the task "
        "file; of several the first that is there",
        affects_output=False,
    )
    images: str | None = setting(
        None,
        "folder in which paths of pictures begin, as `data`; none: that of the rows, and files anywhere below the folder of "
        "the data by their names",
        affects_output=False,
    )
    chat: bool = setting(True, "ask by the model's chat template, which alone has places for pictures")
    max_tokens: int = setting(32, "longest answer", unit="tokens", ge=1)
    instruction: str = setting("", "what is asked for behind each question; empty: nothing")


@dataclass(frozen=True)
class PictureItem:
    """A question. parts: texts and pictures in their order. references: right answers. options: texts by letter, where it is a
    choice. groups: names by which scores are given too."""

    id: str
    parts: tuple[str, ...]
    references: tuple[str, ...]
    options: Mapping[str, str] = field(default_factory=dict)
    groups: tuple[str, ...] = ()


C = TypeVar("C", bound=PictureTaskConfig)


class PictureTask(GenerationTask, Generic[C]):
    """Rows of files as questions with pictures. A score by group is NAME_GROUP. Items of one picture are not independent."""

    #: Columns that hold pictures.
    picture_columns: ClassVar[tuple[str, ...]] = ("image", "imgname")
    #: Whether all files of the data lie in one folder.
    of_one_folder: ClassVar[bool] = True
    at_once = 16

    def __init__(self, config: C, folders: list[Path]) -> None:
        """folders: where the data is looked for in turn; one that is a file is the data.

        Raises ArtefactError for a file that is not there, damaged or empty, and for a row or a picture that does not fit.
        """
        self.name = config.name
        self.settings: Mapping[str, Any] = config.output_settings()
        self.begin_token = config.begin_token
        self.generation = config.generation
        self._config = config
        names = [config.data] if isinstance(config.data, str) else config.data
        files = find_files(names, folders, of_one_folder=self.of_one_folder)
        self._items: list[PictureItem] = []
        seen: set[str] = set()
        for file in files:
            images = None if config.images is None else _folder_of(config.images, folders)
            for record in picture_records(file, self.picture_columns, images):
                if len(self._items) == config.limit:
                    break
                item = self._item(record, file)
                if item is None:
                    continue
                if item.id in seen:
                    raise record.error(f"a row before it is called {item.id!r} too")
                seen.add(item.id)
                self._items.append(item)
        if not self._items:
            raise ConfigError(f"task {config.name}: {', '.join(str(file.path) for file in files[:3])}: no row is asked")

    def questions(self) -> list[GenerationQuestion]:
        return [
            GenerationQuestion(number, self._context(item), id=item.id, cluster=_cluster(item))
            for number, item in enumerate(self._items)
        ]

    def item_texts(self) -> dict[str, list[str]]:
        """Question, options and right answers of each item."""
        return {item.id: [*_texts(item.parts), *item.options.values(), *item.references] for item in self._items}

    def reference(self, question: GenerationQuestion) -> str:
        return self._items[question.item].references[0]

    def judge(self, question: GenerationQuestion, texts: Sequence[str]) -> Outcome:
        item = self._items[question.item]
        outcome = self._judged(item, texts)
        scores, weights = dict(outcome.scores), dict(outcome.weights)
        for name, score in outcome.scores.items():
            for group in item.groups:
                scores[f"{name}_{group}"] = score
                if name in outcome.weights:
                    weights[f"{name}_{group}"] = outcome.weights[name]
        gold = item.references[0] if len(item.references) == 1 else list(item.references)
        return Outcome(scores, "\n\n".join(texts), outcome.chosen, gold, weights, outcome.counts)

    @abstractmethod
    def _item(self, record: Record, file: DataFile) -> PictureItem | None:
        """A row as a question; None for one that is not asked. Raises ArtefactError for one that does not fit."""

    @abstractmethod
    def _judged(self, item: PictureItem, texts: Sequence[str]) -> Outcome:
        """Scores of the answers to an item, and what was read of them."""

    def _context(self, item: PictureItem) -> Context:
        config = self._config
        first = "\n\n".join(part for part in (config.system, config.description) if part)
        content = [
            {"type": "image", "image": part} if isinstance(part, StoredPicture) else {"type": "text", "text": part}
            for part in item.parts
        ]
        return (*([{"role": "system", "content": first}] if first else []), {"role": "user", "content": content})

    def _with_instruction(self, question: str) -> str:
        return f"{question}\n{self._config.instruction}" if self._config.instruction else question


def _folder_of(images: str, folders: Sequence[Path]) -> Path:
    for folder in folders:
        base = folder.parent if folder.is_file() else folder
        if (base / images).is_dir():
            return base / images
    raise ConfigError(f"images: there is no folder {images} in {' and '.join(map(str, folders))}")


def _texts(parts: Sequence[str]) -> list[str]:
    return [part for part in parts if not isinstance(part, StoredPicture)]


def _cluster(item: PictureItem) -> str | None:
    return next((str(part) for part in item.parts if isinstance(part, StoredPicture)), None)


def _first(record: Record, *names: str) -> str:
    """The first of the fields that a row has; the first of all where it has none."""
    return next((name for name in names if record.values.get(name) is not None), names[0])


def _picture(record: Record, *names: str) -> StoredPicture:
    name = _first(record, *names)
    picture = record.field(name)
    if not isinstance(picture, StoredPicture):
        raise record.error(f"the field {name!r} must be a picture or a path to one, it is a {type(picture).__name__}")
    return picture


# ------------------------------------------------------------------------------------------------------- MMMU


class MMMUConfig(PictureTaskConfig):
    """MMMU (Yue et al. 2023), as the Parquet files of its data set."""

    kind: Literal["mmmu"] = setting("mmmu", "questions of college subjects, with options or open, as MMMU has them")
    instruction: str = setting(
        "Answer with the option's letter from the given choices directly.", "what is asked for behind a question with options"
    )
    open_instruction: str = setting(_SHORTLY, "what is asked for behind a question without options")
    subjects: list[str] = setting(default_factory=list, description="the subjects that are asked, as `Art_Theory`; empty: all")


_PLACE = re.compile(r"<image (\d+)>")
_ID = re.compile(r"[a-z]+_(.+)_\d+")


class MMMUTask(PictureTask[MMMUConfig]):
    """`accuracy`, and by subject `accuracy_SUBJECT`. As in MMMU's own evaluation an answer from which no option can be read is
    a guess: it counts as what guessing gives, and is counted (`unread`)."""

    picture_columns = tuple(f"image_{number}" for number in range(1, 8))
    of_one_folder = False

    def __init__(self, config: MMMUConfig, folders: list[Path]) -> None:
        super().__init__(config, folders)
        self.chance = fmean(1 / len(item.options) if item.options else 0.0 for item in self._items)

    def _item(self, record: Record, file: DataFile) -> PictureItem | None:
        id = record.text("id")
        named = _ID.fullmatch(id)
        subject = named[1] if named else file.path.parent.name
        if self._config.subjects and subject not in self._config.subjects:
            return None
        given = _listed(record, "options") if record.values.get("options") is not None else []
        options = dict(zip(ascii_uppercase, given, strict=False))
        is_open = record.values.get("question_type") == "open" or not options
        references = _listed(record, "answer")
        if references == ["?"]:
            raise record.error("its answer is withheld ('?'), as those of the test split are; ask the validation split")
        if not is_open and any(reference not in options for reference in references):
            raise record.error(f"'answer' is {references[0]!r}, and the options are {', '.join(options)}")
        question = record.text("question")
        listed = [] if is_open else [f"({letter}) {text}" for letter, text in options.items()]
        instruction = self._config.open_instruction if is_open else self._config.instruction
        text = "\n\n".join(part for part in (question, "\n".join(listed), instruction) if part)
        return PictureItem(id, _placed(record, text), tuple(references), {} if is_open else options, (subject,))

    def _judged(self, item: PictureItem, texts: Sequence[str]) -> Outcome:
        if not item.options:
            right = [float(answers_right(text, item.references)) for text in texts]
            return Outcome({"accuracy": fmean(right)}, chosen=list(texts), counts={"unread": 0})
        chosen = [chosen_option(text, item.options) for text in texts]
        right = [1 / len(item.options) if letter is None else float(letter in item.references) for letter in chosen]
        return Outcome({"accuracy": fmean(right)}, chosen=chosen, counts={"unread": chosen.count(None)})


def _listed(record: Record, name: str) -> list[str]:
    """A field that holds texts: a list, or one written as Python writes it; else the text alone."""
    value = record.field(name)
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise record.error(f"{name!r} is {value[:60]!r}, which is no list as Python writes it") from None
        if not isinstance(value, list):
            raise record.error(f"{name!r} holds no list")
        return [str(each) for each in value]
    return record.texts(name)


def _placed(record: Record, text: str) -> tuple[str, ...]:
    """A text with its pictures in the first places of `<image 1>` and so on; pictures without a place stand before it."""
    parts: list[str] = []
    shown: set[str] = set()
    begin = 0
    for place in _PLACE.finditer(text):
        name = f"image_{place[1]}"
        if name in shown:
            continue
        shown.add(name)
        parts += [text[begin : place.start()], _picture(record, name)]
        begin = place.end()
    parts.append(text[begin:])
    others = [] if shown else [_picture(record, "image_1")]
    return tuple(part for part in (*others, *parts) if part.strip())


# ------------------------------------------------------------------------------------------------------- ChartQA


class ChartQAConfig(PictureTaskConfig):
    """ChartQA (Masry et al. 2022), as its JSON files beside folders of pictures, or as Parquet."""

    kind: Literal["chartqa"] = setting("chartqa", "questions about charts, as ChartQA has them")
    max_tokens: int = setting(16, "longest answer", unit="tokens", ge=1)
    instruction: str = setting("Answer the question with a single word.", "what is asked for behind each question")


class ChartQATask(PictureTask[ChartQAConfig]):
    """`relaxed_accuracy`, and that of questions by people (`_human`) and by a model (`_augmented`)."""

    def headline(self, form: str) -> str:
        return "relaxed_accuracy"

    def _item(self, record: Record, file: DataFile) -> PictureItem:
        given = record.values.get("type", record.values.get("human_or_machine"))
        origin = f"{file.path.stem if given is None else given}".lower()
        is_human = "human" in origin or given in (0, "0")
        group = "human" if is_human else "augmented" if given is not None or "augmented" in origin else ""
        question = self._with_instruction(record.text(_first(record, "question", "query")))
        references = record.texts(_first(record, "answer", "label"))
        parts = (_picture(record, "image", "imgname"), question)
        id = f"{file.path.stem}/{record.number}"
        return PictureItem(id, parts, tuple(references), groups=(group,) if group else ())

    def _judged(self, item: PictureItem, texts: Sequence[str]) -> Outcome:
        right = [float(any(relaxed_match(text, reference) for reference in item.references)) for text in texts]
        return Outcome({"relaxed_accuracy": fmean(right)}, chosen=list(texts))


# ------------------------------------------------------------------------------------------------------- DocVQA


class DocVQAConfig(PictureTaskConfig):
    """DocVQA (Mathew et al. 2021), as its JSON beside a folder of pages, or as Parquet."""

    kind: Literal["docvqa"] = setting("docvqa", "questions about scanned pages, as DocVQA has them")
    instruction: str = setting(_SHORTLY, "what is asked for behind each question")


class DocVQATask(PictureTask[DocVQAConfig]):
    """`anls` (average normalised Levenshtein similarity), and `anls_TYPE` by type of question."""

    def headline(self, form: str) -> str:
        return "anls"

    def _item(self, record: Record, file: DataFile) -> PictureItem:
        if "answers" not in record.values:
            raise record.error("has no field 'answers'; those of the test split are withheld, ask the validation split")
        types = record.values.get("question_types") or []
        groups = tuple(str(each).replace(" ", "_") for each in types) if isinstance(types, list) else ()
        parts = (_picture(record, "image"), self._with_instruction(record.text("question")))
        return PictureItem(record.text("questionId"), parts, tuple(record.texts("answers")), groups=groups)

    def _judged(self, item: PictureItem, texts: Sequence[str]) -> Outcome:
        return Outcome({"anls": fmean(anls(text, item.references) for text in texts)}, chosen=list(texts))


# ------------------------------------------------------------------------------------------------------- POPE


class POPEConfig(PictureTaskConfig):
    """POPE (Li et al. 2023), as its JSON lines beside a folder of pictures, or as Parquet."""

    kind: Literal["pope"] = setting("pope", "whether things are in a picture, as POPE asks it")
    max_tokens: int = setting(16, "longest answer", unit="tokens", ge=1)
    instruction: str = setting(_SHORTLY, "what is asked for behind each question")


_CATEGORY = re.compile(r"random|popular|adversarial")


class POPETask(PictureTask[POPEConfig]):
    """`accuracy`, `precision`, `recall`, `f1` and `yes_ratio`, and each by category (`f1_adversarial`)."""

    chance = 0.5

    def _item(self, record: Record, file: DataFile) -> PictureItem:
        label = record.text(_first(record, "label", "answer")).strip().lower()
        if label not in ("yes", "no"):
            raise record.error(f"the right answer is {label!r}, and must be yes or no")
        given = record.values.get("category") or next(iter(_CATEGORY.findall(file.path.stem)), "")
        question = self._with_instruction(record.text(_first(record, "text", "question")))
        id = f"{given or file.path.stem}/{record.text('question_id')}"
        parts = (_picture(record, "image"), question)
        return PictureItem(id, parts, (label,), groups=(str(given),) if given else ())

    def _judged(self, item: PictureItem, texts: Sequence[str]) -> Outcome:
        is_yes = [says_yes(text) for text in texts]
        scores, weights = detection_scores(is_yes, item.references == ("yes",))
        return Outcome(scores, chosen=["yes" if each else "no" for each in is_yes], weights=weights)
