"""What Bessemer can do, as tools: `bessemer mcp` serves them to any agent.

They read and compute, and change nothing: no run is started, no file written. Their arguments name only what the operator has
given (models, indexes) and what comes with the package (recipes, tasks), so that an agent which was talked into something
cannot have other files read.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from bessemer.assistant.tools import Tool
from bessemer.core.config import nearest
from bessemer.core.errors import RequestError

if TYPE_CHECKING:
    from bessemer.inference.engine import Engine
    from bessemer.retrieval.index import OpenIndex
    from bessemer.retrieval.search import Hit

INSTRUCTIONS = (
    "Bessemer makes and serves language models. These tools search indexes of documents, answer from them with citations, let "
    "a local model write, look inside it, evaluate it, plan training runs, and say why a text would be kept or dropped from a "
    "corpus."
)
#: Seconds for a call: a model on a processor takes its time.
_SECONDS = 600.0
#: Settings that a client may change in a plan: numbers and words, no paths and no code.
_OVERRIDE = re.compile(r"(model|pretrain)(\.[a-z_]+)+=[A-Za-z0-9_.+-]*")
_MOST_QUESTIONS, _MOST_TOKENS, _LONGEST_INSPECTED = 200, 2_048, 64


@dataclass
class Abilities:
    """Models and indexes by name, opened when they are first needed; a context manager, whose end closes them.

    One model is open at a time.
    """

    models: Mapping[str, Path]
    indexes: Mapping[str, Path]
    device: str = "auto"
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _opened: ExitStack = field(default_factory=ExitStack, init=False)
    _engine: tuple[str, Engine] | None = field(default=None, init=False)
    _indexes: dict[str, OpenIndex] = field(default_factory=dict, init=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def tools(self) -> list[Tool]:
        """The tools: those of models and indexes only where there are any."""
        of_models = [
            _tool(
                self.generate,
                "Let a local language model answer a prompt, or continue it where the model has no chat template.",
                prompt=_text("what the model reads"),
                model=self._named("model", self.models),
                max_tokens=_number("most tokens of the answer", 1, _MOST_TOKENS),
            ),
            _tool(
                self.inspect_model,
                "Facts about a local model: parameters, layers, heads, context length, vocabulary, and how it computes here. "
                "With a text, also what it predicts at its end, layer by layer.",
                model=self._named("model", self.models),
                text=_text("a short text that the model reads"),
            ),
            _tool(
                self.evaluate,
                "Score a local model on a task with few items; returns accuracy with its standard error.",
                model=self._named("model", self.models),
                task=_text("name of a task, such as arithmetic or code"),
                limit=_number("how many items", 1, _MOST_QUESTIONS),
            ),
        ]
        of_indexes = [
            _tool(
                self.search_documents,
                "Find passages in an index of documents, by words and by meaning.",
                query=_text("what to look for"),
                index=self._named("index", self.indexes),
                count=_number("how many passages", 1, 20),
            ),
        ]
        of_both = [
            _tool(
                self.ask_documents,
                "Answer a question from an index of documents with a local model; each sentence cites its sources.",
                question=_text("the question"),
                index=self._named("index", self.indexes),
                model=self._named("model", self.models),
            ),
        ]
        always = [
            _tool(
                self.plan_run,
                "What a training run would take: memory, time, cost, and the best layout over the cards. Nothing is started.",
                recipe=_text("name of a recipe, such as quickstart, 125m or 1b"),
                gpus=_number("number of cards", 1, 100_000),
                gpu=_text("kind of card, such as h100, a100, rtx4090 or cpu"),
                overrides={"type": "array", "items": {"type": "string"}, "description": "settings, as model.hidden_size=512"},
            ),
            _tool(
                self.explain_document,
                "What every edit and filter of the data refinery says about a text, and whether it would be kept for training.",
                text=_text("the text itself"),
                url=_text("where it was found"),
            ),
        ]
        return [
            *(of_models if self.models else ()),
            *(of_indexes if self.indexes else ()),
            *(of_both if self.models and self.indexes else ()),
            *always,
        ]

    # -- the tools; each raises BessemerError for what its caller can mend

    def generate(self, prompt: str, model: str = "", max_tokens: int = 256) -> str:
        """The model's answer to a prompt."""
        from bessemer.inference.sampling.params import SamplingParams

        with self._lock:
            engine = self._model(model)
            params = SamplingParams(max_tokens=max_tokens, temperature=0)
            if engine.tokenizer.chat_template is None:
                return engine.generate(prompt, params)[0].text
            return engine.chat([{"role": "user", "content": prompt}], params).text

    def inspect_model(self, model: str = "", text: str = "") -> dict[str, Any]:
        """Facts about a model, and what its layers predict at the end of a text."""
        with self._lock:
            engine = self._model(model)
            config = engine.model.config
            facts: dict[str, Any] = {
                "parameters": config.parameters(),
                "layers": config.num_hidden_layers,
                "hidden_size": config.hidden_size,
                "attention_heads": config.num_attention_heads,
                "key_value_heads": config.num_key_value_heads,
                "context_length": engine.context_length,
                "vocabulary": config.vocab_size,
                "has_chat_template": engine.tokenizer.chat_template is not None,
                "memory": engine.describe(),
                "arithmetic": engine.arithmetic,
            }
            if text:
                facts["predictions_by_layer"] = self._predictions(model, text)
            return facts

    def _predictions(self, model: str, text: str) -> list[dict[str, Any]]:
        from bessemer.inspection.inspect import inspect
        from bessemer.model.device import choose_device
        from bessemer.model.storage.folder import load_model
        from bessemer.tokenization.tokenizer import load_tokenizer

        folder = self._find("model", model, self.models)
        tokenizer = load_tokenizer(folder)
        if (length := len(tokenizer.encode(text))) > _LONGEST_INSPECTED:
            raise RequestError(f"the text has {length} tokens, and at most {_LONGEST_INSPECTED} are looked at")
        seen = inspect(load_model(folder, choose_device(self.device)), tokenizer, text, ablate=False)
        return [
            {"layer": layer, "tokens": [seen.pieces[int(id)] for id in ids_k]}
            for layer, ids_k in enumerate(seen.lens.tokens_LTk[:, -1])
        ]

    def evaluate(self, task: str, model: str = "", limit: int = 20) -> dict[str, Any]:
        """Scores of a model on a task that comes with the package."""
        from bessemer.evaluation.tasks import score_tasks
        from bessemer.tasks.config import TaskOptions
        from bessemer.tasks.registry import TASKS, find_tasks

        if task not in TASKS:
            raise RequestError(f"there is no task {task!r}{nearest(task, list(TASKS))}")
        tasks = find_tasks([task], TaskOptions(limit=limit))
        with self._lock:
            return score_tasks(self._model(model), tasks)

    def search_documents(self, query: str, index: str = "", count: int = 5) -> list[dict[str, Any]]:
        """The passages that fit a query best."""
        from bessemer.retrieval.search import search

        with self._lock:
            return [_passage(hit) for hit in search(self._index(index), query, count)]

    def ask_documents(self, question: str, index: str = "", model: str = "") -> dict[str, Any]:
        """An answer from an index, with its sources."""
        from bessemer.retrieval.answer import ask

        with self._lock:
            answer = ask(self._model(model), self._index(index), question)
        return {
            "answer": answer.text,
            "is_held": answer.is_held,
            "statements": [
                {"text": one.text, "cited": list(one.cited), "is_supported": one.is_supported} for one in answer.statements
            ],
            "sources": [_passage(hit) for hit in answer.sources],
        }

    def plan_run(self, recipe: str, gpus: int = 1, gpu: str = "h100", overrides: Sequence[str] = ()) -> dict[str, Any]:
        """What a training run would take."""
        from bessemer.pipeline.planning import training_plan
        from bessemer.pipeline.recipe import shipped_recipes
        from bessemer.scaling.hardware import find_card
        from bessemer.scaling.job import PlannedJob
        from bessemer.scaling.planner import plan_summary, plans, requested_plan

        if recipe not in (known := shipped_recipes()):
            raise RequestError(f"there is no recipe {recipe!r}{nearest(recipe, list(known))}")
        if wrong := next((one for one in overrides if not _OVERRIDE.fullmatch(one) or ".py" in one), None):
            raise RequestError(f"overrides: {wrong!r} is not model.NAME=VALUE or pretrain.NAME=VALUE, a number or a word")
        training, card = training_plan(recipe, list(overrides)), find_card(gpu)
        job = PlannedJob(training.model, training.settings, card)
        layouts = plans(job, gpus, count=1)
        tokens = training.tokens or layouts[0].tokens_per_second * 60 * (training.minutes or 0)
        summary = plan_summary(layouts, tokens=tokens, price=card.price, asked=requested_plan(job, gpus))
        return {"name": training.name, **summary, "price_is_assumed": True}

    def explain_document(self, text: str, url: str = "") -> dict[str, Any]:
        """What filters and edits say about a text."""
        from bessemer.data.stages.explain import explain

        return asdict(explain(text, url=url or None))

    # -- what is open

    def _model(self, name: str) -> Engine:
        from bessemer.inference.engine import Engine

        place = self._find("model", name, self.models)
        if self._engine is None or self._engine[0] != str(place):
            self._opened.close()
            self._engine = (str(place), self._opened.enter_context(Engine(place, device=self.device)))
        return self._engine[1]

    def _index(self, name: str) -> OpenIndex:
        from bessemer.retrieval.index import open_index

        place = self._find("index", name, self.indexes)
        if str(place) not in self._indexes:
            self._indexes[str(place)] = open_index(place)
        return self._indexes[str(place)]

    def _find(self, kind: str, name: str, known: Mapping[str, Path]) -> Path:
        """The place of a name; without a name, the first one."""
        if not name:
            return next(iter(known.values()))
        if name not in known:
            raise RequestError(f"there is no {kind} {name!r}{nearest(name, list(known))}")
        return known[name]

    def _named(self, kind: str, known: Mapping[str, Path]) -> dict[str, Any]:
        return {"type": "string", "enum": list(known), "description": f"which {kind}; the first without it"}


def _passage(hit: Hit) -> dict[str, Any]:
    about = {name: value for name, value in hit.details.items() if value not in (None, "", {}) and name != "box"}
    return {"text": hit.passage.text, **about}


def _text(description: str) -> dict[str, Any]:
    return {"type": "string", "description": description}


def _number(description: str, least: int, most: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": least, "maximum": most, "description": description}


def _tool(function: Callable[..., Any], description: str, **properties: Mapping[str, Any]) -> Tool:
    """A tool whose required arguments are the function's parameters without a default."""
    import inspect

    defaults = inspect.signature(function).parameters
    required = [name for name in properties if defaults[name].default is inspect.Parameter.empty]
    schema = {"type": "object", "properties": dict(properties), "required": required, "additionalProperties": False}

    def call(**arguments: Any) -> str:
        value = function(**arguments)
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)

    return Tool(function.__name__, description, schema, call, time_limit=_SECONDS)
