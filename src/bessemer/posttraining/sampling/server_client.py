"""Client of one rollout server: completions as token ids with their log-probabilities, and new weights.

| kind | completions | weights | adapter |
|---|---|---|---|
| bessemer | `/v1/completions`, a version for each token | `/v1/weights/…`, pieces over HTTP | the same |
| vllm | `/v1/completions`, `return_token_ids` | `/collective_rpc` `reload_weights`, from a folder | `/v1/load_lora_adapter` |
| sglang | `/generate` | `/update_weights_from_disk` | `/load_lora_adapter` |
| openai | `/v1/completions`, ids by the texts of tokens | none | none |

vLLM has these routes with `VLLM_SERVER_DEV_MODE=1`, and adapters with `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from bessemer.core.errors import ConfigError
from bessemer.core.http_client import ApiError, HttpClient, TransientError
from bessemer.inference.sampling.params import SamplingParams
from bessemer.inference.weight_transfer import adapter_tensors, pieces_of
from bessemer.model.adapters import Adapter
from bessemer.posttraining.sampling.server_config import RolloutServers, ServerKind
from bessemer.tokenization.tokenizer import Tokenizer

#: The adapter's name on servers; where every version has a name of its own, its beginning.
ADAPTER = "policy"
#: Most bytes of a response: log-probabilities as JSON take about a hundred bytes a token.
_MOST_BYTES = 1 << 30
#: Timeout in seconds of requests for which the server computes nothing.
_SHORT = 30.0
#: Limit of seeds on servers other than ours: 31 bits.
_SEEDS = 2**31


class ServedCompletion(NamedTuple):
    """A completion from a server. log_probs: of each token, in nats; versions: of the weights that sampled each token."""

    token_ids: Sequence[int]
    log_probs: Sequence[float]
    versions: Sequence[int]
    text: str
    is_cut: bool


@dataclass(frozen=True)
class WeightUpdate:
    """New weights for servers: whole tensors by the names of the model, or an adapter. folder: where they lie on disk for
    servers that read folders; None: they are not written."""

    version: int
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    adapter: Adapter | None = None
    folder: Path | None = None


class CompletionServer:
    """One server. Any number of threads may request completions; one at a time sends weights. version: that of the server's
    weights; −1: unknown, or weights that it had at its start. An adapter's version is the same number.
    """

    def __init__(self, url: str, settings: RolloutServers, tokenizer: Tokenizer) -> None:
        """Raises ConfigError as `HttpClient`."""
        self._settings = settings
        self._client = HttpClient(
            url.removesuffix("/").removesuffix("/v1"),
            key_variable=settings.key_variable,
            timeout=settings.timeout,
            most_bytes=_MOST_BYTES,
        )
        self.url = self._client.url
        self._tokenizer = tokenizer
        self._ids_of_texts: dict[str, int] | None = None
        self._lock = threading.Lock()
        self.kind: ServerKind = settings.kind
        self._base = settings.model or ""
        self.context_length: int | None = None
        self.version = -1
        #: The adapter's name in requests; None: the model alone.
        self.adapter: str | None = None
        #: Versions of the adapter that are loaded, under names of their own.
        self._loaded: list[str] = []

    # -- what it is

    def connect(self) -> None:
        """Find out the kind of the server and its name of the model.

        Raises TransientError where it cannot be reached, ApiError where it refuses, and ConfigError for an unknown model.
        """
        listed = self._client.get("/v1/models", timeout=_SHORT)
        models = listed.get("data") if isinstance(listed, Mapping) else None
        if not isinstance(models, list) or not models or not all(isinstance(one, Mapping) for one in models):
            raise ApiError(f"{self.url}: /v1/models gives no list of models; is it a server of OpenAI's API?")
        by_name = {str(one.get("id")): one for one in models}
        name = self._settings.model or str(models[0].get("id"))
        if name not in by_name:
            raise ConfigError(f"rollouts: model: {self.url} has no model {name!r}; it has {', '.join(by_name)}")
        self._base = name
        longest = by_name[name].get("max_model_len")
        self.context_length = longest if isinstance(longest, int) else None
        if self._settings.kind == "auto":
            owner = str(by_name[name].get("owned_by"))
            kinds: dict[str, ServerKind] = {"bessemer": "bessemer", "vllm": "vllm", "sglang": "sglang"}
            self.kind = kinds.get(owner, "openai")

    def scales_log_probs(self, token: int, temperature: float) -> bool:
        """Whether log-probabilities are those at the temperature of the samples, by the likeliest tokens after one token: their
        differences are then divided by it. Raises as `HttpClient.send`."""
        plain, scaled = self._likeliest(token, 1.0), self._likeliest(token, temperature)
        both = sorted(plain.keys() & scaled.keys(), key=lambda name: plain[name])
        if len(both) < 2:
            return True
        first, last = both[0], both[-1]
        gap, found = plain[last] - plain[first], scaled[last] - scaled[first]
        return abs(found - gap / temperature) < abs(found - gap)

    def _likeliest(self, token: int, temperature: float) -> dict[str, float]:
        if self.kind == "sglang":
            sampling = {"max_new_tokens": 1, "temperature": temperature}
            body = {"input_ids": [token], "sampling_params": sampling, "return_logprob": True, "top_logprobs_num": 5}
            answer = self._client.post("/generate", body, timeout=_SHORT)
            return {str(id): float(value) for value, id, *_ in answer["meta_info"]["output_top_logprobs"][0]}
        body = {"model": self._base, "prompt": [token], "max_tokens": 1, "temperature": temperature, "logprobs": 5}
        answer = self._client.post("/v1/completions", body, timeout=_SHORT)
        return {text: float(value) for text, value in answer["choices"][0]["logprobs"]["top_logprobs"][0].items()}

    # -- completions

    def complete(self, ids: Sequence[int], number: int, params: SamplingParams) -> list[ServedCompletion]:
        """`number` completions of a prompt of token ids. Raises TransientError and ApiError as `HttpClient.send`."""
        # weights may arrive during the request; tokens of a server that reports no versions count as sampled by the old ones
        version = max(self.version, 0)
        if self.kind == "sglang":
            return self._generated(ids, number, params, version)
        body = self._body(ids, number, params)
        answer = self._client.post("/v1/completions", body)
        try:
            choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
            completions = [self._of_choice(choice, version) for choice in choices]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ApiError(f"{self.url}: the answer is no completion with log-probabilities: {error}") from None
        return self._checked(completions, number)

    def _body(self, ids: Sequence[int], number: int, params: SamplingParams) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.adapter or self._base,
            "prompt": list(ids),
            "n": number,
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "logprobs": 0,
        }
        if params.stop:
            body["stop"] = list(params.stop)
        if self.kind == "bessemer":
            body |= {"logprobs_mode": "temperature", "return_token_ids": True, "return_weight_versions": True}
            body |= self._grammar(params)
            return body if params.seed is None else {**body, "seed": params.seed}
        if params.seed is not None:
            body["seed"] = params.seed % _SEEDS
        if self.kind == "vllm":
            body |= {"logprobs": 1, "return_token_ids": True}
            body |= self._grammar(params)
        return body

    def _grammar(self, params: SamplingParams) -> dict[str, Any]:
        """The parameters of a request that constrain its text to the tools' schemas."""
        fields = {"json_schema": "json", "regex": "regex", "choice": "choice", "ebnf": "grammar"}
        given = {to: getattr(params, name) for name, to in fields.items() if getattr(params, name) is not None}
        extra: dict[str, Any] = {"structured_outputs": given} if given else {}
        if params.stop_token_ids:
            extra["stop_token_ids"] = list(params.stop_token_ids)
        if params.allowed_tokens is not None:
            extra["allowed_token_ids"] = list(params.allowed_tokens)
        return extra

    def _of_choice(self, choice: Mapping[str, Any], version: int) -> ServedCompletion:
        log_probs = [float(value) for value in choice["logprobs"]["token_logprobs"]]
        ids = choice.get("token_ids")
        if ids is None:
            ids = [self._id_of_text(text) for text in choice["logprobs"]["tokens"]]
        versions = choice.get("weight_versions") or [version] * len(ids)
        return ServedCompletion(list(ids), log_probs, versions, str(choice["text"]), choice["finish_reason"] == "length")

    def _generated(self, ids: Sequence[int], number: int, params: SamplingParams, version: int) -> list[ServedCompletion]:
        """Completions by SGLang's own route, whose response has token ids."""
        sampling: dict[str, Any] = {"max_new_tokens": params.max_tokens, "temperature": params.temperature, "n": number}
        if params.stop:
            sampling["stop"] = list(params.stop)
        if params.stop_token_ids:
            sampling["stop_token_ids"] = list(params.stop_token_ids)
        if params.seed is not None:
            sampling["sampling_seed"] = params.seed % _SEEDS
        body: dict[str, Any] = {"input_ids": list(ids), "sampling_params": sampling, "return_logprob": True}
        if self.adapter is not None:
            body["lora_path"] = self.adapter
        answer = self._client.post("/generate", body)
        try:
            completions = []
            for one in answer if isinstance(answer, list) else [answer]:
                meta = one["meta_info"]
                pairs = [(int(entry[1]), float(entry[0])) for entry in meta["output_token_logprobs"]]
                is_cut = meta["finish_reason"]["type"] == "length"
                token_ids, log_probs = [id for id, _ in pairs], [value for _, value in pairs]
                completions.append(ServedCompletion(token_ids, log_probs, [version] * len(pairs), str(one["text"]), is_cut))
        except (LookupError, TypeError, ValueError) as error:
            raise ApiError(f"{self.url}: /generate gives no tokens with log-probabilities: {error}") from None
        return self._checked(completions, number)

    def _checked(self, completions: list[ServedCompletion], number: int) -> list[ServedCompletion]:
        """The completions, checked. Raises TransientError where a server broke one off, as some do when they get new
        weights."""
        if len(completions) != number:
            raise ApiError(f"{self.url}: {number} completions were asked for, and {len(completions)} came")
        for one in completions:
            if not one.token_ids:
                raise TransientError("broke a completion off before its first token", is_busy=True)
            if not len(one.token_ids) == len(one.log_probs) == len(one.versions):
                raise ApiError(
                    f"{self.url}: {len(one.token_ids)} tokens came with {len(one.log_probs)} log-probabilities; rl needs "
                    "that of each token"
                )
        return completions

    def _id_of_text(self, text: str) -> int:
        """The token with this text, if there is only one; for servers that send no ids."""
        with self._lock:
            if self._ids_of_texts is None:
                ids: dict[str, int] = {}
                for id in range(self._tokenizer.vocab_size):
                    written = self._tokenizer.decode([id], skip_special=False)
                    # mark a text of two tokens: which of them was sampled is unknown
                    ids[written] = -1 if written in ids else id
                self._ids_of_texts = ids
        id = self._ids_of_texts.get(text, -1)
        if id < 0:
            raise ApiError(
                f"{self.url}: sends no token ids (vLLM's return_token_ids), and the text {text!r} is of no single token; take "
                "a server that sends them"
            )
        return id

    # -- weights

    @property
    def reads_folders(self) -> bool:
        """Whether the server reads weights from a folder that both see."""
        return self.kind in ("vllm", "sglang")

    def send_weights(self, update: WeightUpdate) -> None:
        """Send new weights. Requests in progress continue with them if the server can do that.

        Raises TransientError and ApiError as `HttpClient.send`; ConfigError for a server that accepts none.
        """
        match self.kind:
            case "bessemer":
                self._send_pieces(update)
            case "vllm" | "sglang":
                assert update.folder is not None, "what is sent to a server that reads folders was written"
                name = f"{ADAPTER}-{update.version}"
                if update.adapter is None:
                    (self._reload_vllm if self.kind == "vllm" else self._reload_sglang)(update.folder, update.version)
                else:
                    self._load_adapter(name, update.folder)
            case _:
                raise ConfigError(
                    f"rollouts: {self.url} is no server that takes new weights (ours, vLLM and SGLang do); kind names one that "
                    "/v1/models does not tell"
                )
        self.version = update.version

    def _send_pieces(self, update: WeightUpdate) -> None:
        timeout = self._settings.weight_timeout
        body: dict[str, Any] = {"version": update.version}
        tensors = update.weights
        if update.adapter is not None:
            tensors, scales = adapter_tensors(update.adapter)
            body |= {"adapter": ADAPTER, "scales": scales}
        started = self._client.post("/v1/weights/begin", body, timeout=timeout)
        path = f"/v1/weights/piece?update={started['update']}"
        for piece in pieces_of(tensors):
            self._client.send(path, piece, content_type="application/octet-stream", timeout=timeout)
        self._client.post("/v1/weights/commit", {"update": started["update"]}, timeout=timeout)
        self.adapter = None if update.adapter is None else ADAPTER

    def _reload_vllm(self, folder: Path, version: int) -> None:
        timeout = self._settings.weight_timeout
        # requests under way are frozen and go on; servers before that route change weights between two steps in any case
        can_pause = self._post_if_there("/pause?mode=keep", {})
        try:
            call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            self._client.post("/collective_rpc", call, timeout=timeout)
            self._client.send("/reset_prefix_cache", b"", timeout=timeout)
        finally:
            if can_pause:
                self._client.send("/resume", b"", timeout=timeout)
        self._post_if_there("/update_weight_version", {"new_version": str(version)})

    def _reload_sglang(self, folder: Path, version: int) -> None:
        body = {"model_path": str(folder), "flush_cache": True, "weight_version": str(version)}
        answer = self._client.post("/update_weights_from_disk", body, timeout=self._settings.weight_timeout)
        if not isinstance(answer, Mapping) or answer.get("success") is not True:
            reason = answer.get("message") if isinstance(answer, Mapping) else answer
            raise ApiError(f"{self.url}: /update_weights_from_disk failed: {reason}")

    def _load_adapter(self, name: str, folder: Path) -> None:
        """Load a version under a name of its own, so that requests in progress keep theirs, and unload all but the last two,
        since a request may be about to name the previous one."""
        timeout, prefix = self._settings.weight_timeout, "/v1" if self.kind == "vllm" else ""
        # an earlier run, or a failed attempt, may have loaded this name
        self._post_if_there(f"{prefix}/unload_lora_adapter", {"lora_name": name})
        self._client.post(f"{prefix}/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, timeout=timeout)
        self.adapter = name
        self._loaded.append(name)
        while len(self._loaded) > 2:
            self._post_if_there(f"{prefix}/unload_lora_adapter", {"lora_name": self._loaded.pop(0)})

    def _post_if_there(self, path: str, body: Mapping[str, Any]) -> bool:
        """POST to a route that older servers lack or may refuse. Returns whether it succeeded."""
        try:
            self._client.post(path, body, timeout=self._settings.weight_timeout)
        except ApiError:
            return False
        return True
