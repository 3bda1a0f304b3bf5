"""Servers that follow the protocols of vLLM and SGLang, as their sources and documents have them, over an engine of ours.

A field that the protocol does not have is refused, and so is a completion while the server is paused longer than a moment.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from bessemer.core.errors import ArtefactError, RequestError
from bessemer.inference.engine import Engine, SamplingParams
from bessemer.model.storage.folder import load_model

_SAMPLING = {"n", "temperature", "stop", "stop_token_ids"}


class RefusedError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class StandIn:
    """One server. calls: path and body of every POST; processed: whether log-probabilities are those of the samples."""

    def __init__(self, engine: Engine, kind: str, *, processed: bool = True) -> None:
        self.engine = engine
        self.kind = kind
        self.processed = processed
        self.calls: list[tuple[str, Any]] = []
        self.running = threading.Event()
        self.running.set()

    def get(self, path: str) -> Any:
        if path == "/v1/models":
            entry = {"id": "served", "object": "model", "owned_by": self.kind, "max_model_len": self.engine.context_length}
            return {"object": "list", "data": [entry]}
        raise RefusedError(404, path)

    def post(self, path: str, query: dict[str, list[str]], body: Any) -> Any:
        self.calls.append((path, body))
        if self.kind == "sglang":
            return self._sglang(path, body)
        return self._vllm(path, query, body)

    # -- vLLM

    def _vllm(self, path: str, query: dict[str, list[str]], body: Any) -> Any:
        match path:
            case "/v1/completions":
                return self._completions(body)
            case "/pause":
                assert query["mode"] == ["keep"]
                self.running.clear()
            case "/resume":
                self.running.set()
            case "/collective_rpc":
                assert body["method"] == "reload_weights" and not self.running.is_set()
                self._load(body["kwargs"]["weights_path"])
            case "/reset_prefix_cache":
                assert not self.running.is_set()
            case "/v1/load_lora_adapter":
                if body["lora_name"] in self.engine.adapters:
                    raise RefusedError(400, "The lora adapter has already been loaded.")
                self._load_adapter(body)
            case "/v1/unload_lora_adapter":
                self._unload(body["lora_name"], 404)
            case _:
                raise RefusedError(404, path)
        return {}

    def _completions(self, body: Any) -> Any:
        known = _SAMPLING | {"model", "prompt", "max_tokens", "logprobs", "seed", "return_token_ids", "structured_outputs"}
        if unknown := body.keys() - known:
            raise RefusedError(400, f"unknown fields {unknown}")
        assert self.running.wait(5), "nobody resumed"
        adapter = None if body["model"] == "served" else body["model"]
        if adapter is not None and adapter not in self.engine.adapters:
            raise RefusedError(404, f"The model `{adapter}` does not exist.")
        params = SamplingParams(max_tokens=body["max_tokens"], **{name: body[name] for name in _SAMPLING & body.keys()})
        choices = []
        for index, one in enumerate(self._made(body["prompt"], params, body["logprobs"], body.get("seed"), adapter)):
            tokens = [self.engine.tokenizer.decode([token.token], skip_special=False) for token in one.log_probs]
            top = [
                {self.engine.tokenizer.decode([id], skip_special=False): value for id, value in token.log_probs.top}
                for token in one.log_probs
            ]
            values = [token.log_probs.token for token in one.log_probs]
            choice = {"index": index, "text": one.text, "finish_reason": one.finish_reason, "stop_reason": None}
            choice["logprobs"] = {"tokens": tokens, "token_logprobs": values, "top_logprobs": top, "text_offset": []}
            if body.get("return_token_ids") and self.kind == "vllm":
                choice |= {"token_ids": one.token_ids, "prompt_token_ids": body["prompt"]}
            choices.append(choice)
        return {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": choices}

    # -- SGLang

    def _sglang(self, path: str, body: Any) -> Any:
        match path:
            case "/generate":
                return self._generate(body)
            case "/update_weights_from_disk":
                self._load(body["model_path"])
                return {"success": True, "message": "Succeeded to update model weights."}
            case "/load_lora_adapter":
                self._load_adapter(body)
                return {"success": True}
            case "/unload_lora_adapter":
                self._unload(body["lora_name"], 400)
                return {"success": True}
        raise RefusedError(404, path)

    def _generate(self, body: Any) -> Any:
        sampling = body["sampling_params"]
        if unknown := sampling.keys() - (_SAMPLING | {"max_new_tokens", "sampling_seed"}):
            raise RefusedError(400, f"unknown fields {unknown}")
        params = SamplingParams(
            max_tokens=sampling["max_new_tokens"], **{name: sampling[name] for name in _SAMPLING & sampling.keys()}
        )
        made = self._made(
            body["input_ids"], params, body.get("top_logprobs_num", 0), sampling.get("sampling_seed"), body.get("lora_path")
        )
        answers = []
        for one in made:
            meta = {
                "finish_reason": {"type": one.finish_reason},
                "output_token_logprobs": [[token.log_probs.token, token.token, None] for token in one.log_probs],
                "output_top_logprobs": [[[value, id, None] for id, value in token.log_probs.top] for token in one.log_probs],
            }
            answers.append({"text": one.text, "output_ids": one.token_ids, "meta_info": meta})
        return answers if sampling.get("n", 1) > 1 else answers[0]

    # -- what both do

    def _made(self, prompt: list[int], params: SamplingParams, top: int, seed: int | None, adapter: str | None) -> list[Any]:
        mode = "temperature" if self.processed else "raw"
        params = params.with_changes(logprobs=top, logprobs_mode=mode, seed=seed)
        (first,) = self.engine.generate([prompt], params, adapter=adapter)
        return [first, *first.others]

    def _load(self, folder: str) -> None:
        self.engine.update_weights(dict(load_model(Path(folder)).state_dict()))

    def _load_adapter(self, body: Any) -> None:
        try:
            self.engine.load_adapter(body["lora_name"], Path(body["lora_path"]))
        except ArtefactError as error:
            raise RefusedError(400, str(error)) from None

    def _unload(self, name: str, status: int) -> None:
        try:
            self.engine.unload_adapter(name)
        except RequestError as error:
            raise RefusedError(status, str(error)) from None


@contextmanager
def serving_as(stand_in: StandIn) -> Iterator[str]:
    """The URL of a stand-in on a free port."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, make) -> None:
            try:
                status, answer = 200, make()
            except RefusedError as error:
                status, answer = error.status, {"error": {"message": str(error)}}
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self._answer(lambda: stand_in.get(self.path))

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = urlsplit(self.path)
            self._answer(lambda: stand_in.post(parts.path, parse_qs(parts.query), json.loads(content) if content else None))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()
