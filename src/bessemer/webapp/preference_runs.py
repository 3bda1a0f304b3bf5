"""A run of `preference` on the feedback of the chat page, started from it. A process of its own; the page of runs shows it."""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request

from bessemer.core.store import write_text
from bessemer.pipeline import run_names
from bessemer.serving.runtime.bodies import ApiError, without_places
from bessemer.webapp.access import shown_runs
from bessemer.webapp.feedback import PAIRS, FeedbackApi

#: Pairs below which nothing is started.
LEAST_PAIRS = 8
#: The recipe, in the folder of the feedback, and what its process prints.
RECIPE, LOG = "preference.yaml", "preference.log"
#: Settings as of `bessemer personalise`: an adapter, merged into the model at the end, on a few pairs.
_SETTINGS: dict[str, Any] = {
    "adapter": {"rank": 8},
    "epochs": 4,
    "learning_rate": 2e-4,
    "batch_size": 4,
    "context_length": 1024,
    "validation_share": 0.1,
}


class PreferenceRuns:
    """The route. model: the folder or file of the served model; runs: the folder of the runs; None: nothing is started."""

    def __init__(self, model: Path | None, feedback: FeedbackApi, runs: Path | None) -> None:
        self._model = model
        self._feedback = feedback
        self._runs = runs
        self._running: subprocess.Popen[bytes] | None = None
        self._starts = threading.Lock()

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/feedback/train", self.train, methods=["POST"])
        return router

    async def train(self, request: Request) -> dict[str, Any]:
        """Start a run. Raises ApiError: 403 to those who may not see runs, 400 for too few pairs, 409 while one is at work."""
        runs = shown_runs(request, self._runs)
        feedback = self._feedback.kept_in(request)
        if self._model is None:
            raise ApiError("this server knows no folder or file of its model", status=404, code="not_available")
        return await asyncio.to_thread(self._start_alone, runs, feedback, self._model)

    def _start_alone(self, runs: Path, feedback: Path, model: Path) -> dict[str, Any]:
        with self._starts:
            if self._running is not None and self._running.poll() is None:
                raise ApiError(
                    "a run on the preferences is at work already; its page says how far it is", status=409, code="busy"
                )
            return self._start(runs, feedback, model)

    def _start(self, runs: Path, feedback: Path, model: Path) -> dict[str, Any]:
        pairs = count_pairs(feedback / PAIRS)
        if pairs < LEAST_PAIRS:
            reason = f"there are {pairs} pairs, and {LEAST_PAIRS} are needed: go on comparing"
            raise ApiError(reason, status=400, code="too_few_pairs")
        write_text(feedback / RECIPE, recipe(model, feedback / PAIRS))
        taken = set(run_names(runs))
        name = next(name for number in range(1, len(taken) + 2) if (name := f"preferences-{number}") not in taken)
        command = [sys.executable, "-m", "bessemer", "run", str(feedback / RECIPE), "--name", name, "--runs", str(runs)]
        with (feedback / LOG).open("wb") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        # answers come first
        with suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, process.pid, 10)
        # it ends with the server, and the same command goes on with it
        atexit.register(process.terminate)
        self._running = process
        self._wait_for(runs, name, feedback / LOG)
        return {"run": name, "pairs": pairs}

    def _wait_for(self, runs: Path, name: str, log: Path) -> None:
        """Until the run can be shown. Raises ApiError (400) with the last line of a process that ended before."""
        assert self._running is not None
        while name not in run_names(runs):
            if self._running.poll() is not None:
                *_, last = ["", *log.read_text(encoding="utf-8", errors="replace").splitlines()]
                raise ApiError(f"the run did not start: {without_places(last)}", status=400, code="not_started")
            time.sleep(0.1)


def count_pairs(path: Path) -> int:
    """Rows of a file of pairs."""
    return sum(1 for line in path.open("rb") if line.strip()) if path.is_file() else 0


def recipe(model: Path, pairs: Path) -> str:
    """The recipe of a run: the model, and `preference` on the pairs. JSON is YAML."""
    stages = {"import": str(model.resolve()), "preference": {"data": [str(pairs.resolve())], **_SETTINGS}}
    described = {"format": 1, "name": "preferences", "description": "What was preferred on the chat page.", **stages}
    return json.dumps(described, indent=1, ensure_ascii=False) + "\n"
