"""A Tinker server over a tiny model, and a client that speaks its messages without the package `tinker`."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from bessemer.inference.config import EngineConfig
from bessemer.model.storage.folder import save_model
from bessemer.serving.config import ServingConfig
from bessemer.serving.server import address_of, listen
from bessemer.serving.tinker.app import new_tinker_server
from bessemer.serving.tinker.config import TinkerLimits, TrainingSettings
from bessemer.serving.tinker.service import TinkerService
from bessemer.serving.tinker.states import StateStore
from bessemer.serving.tinker.training import BaseModel
from bessemer.serving.tinker.wire import PROTOBUF, Datum, messages
from tests.model.randomised import SHAPES, random_decoder
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer
from tests.serving.running import quick_stops

#: Numbers of types in a tensor.
FLOAT, INTEGER = 1, 2


def tiny_folder(place: Path) -> Path:
    """A model that has learned nothing, with a tokenizer of bytes."""
    tokenizer = write_small_tokenizer(place / "tokenizer")
    save_model(random_decoder(SHAPES["grouped"].with_changes(vocab_size=VOCAB_SIZE)), place / "model", tokenizer=tokenizer)
    return place / "model"


def example(tokens: Sequence[int], weights: Sequence[float] | None = None, **tensors: Sequence[float]) -> Datum:
    """An example of consecutive tokens: each predicts the next."""
    inputs = {"target_tokens": np.array(tokens[1:], np.int64)}
    inputs["weights"] = np.ones(len(tokens) - 1, np.float32) if weights is None else np.array(weights, np.float32)
    return Datum(np.array(tokens[:-1]), inputs | {name: np.array(values, np.float32) for name, values in tensors.items()})


#: Two short examples.
DATA = [example([5, 9, 3, 14, 22, 8]), example([7, 7, 2, 30])]


@contextmanager
def tinker_server(folder: Path, states: Path, limits: Mapping[str, Any] | None = None, **settings: Any) -> Iterator[str]:
    """The URL of a running server. settings: of `ServingConfig`."""
    base = BaseModel(folder, TrainingSettings(device="cpu", micro_batch_tokens=64))
    engine = EngineConfig(kv_memory=0.01, max_num_seqs=8)
    service = TinkerService(base, "tiny", StateStore(states), limits=TinkerLimits(**(limits or {})), engine=engine)
    listener = listen("127.0.0.1", 0)
    server = new_tinker_server(service, ServingConfig(**settings))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    with quick_stops():
        try:
            yield address_of(listener)
        finally:
            server.should_exit = True
            thread.join(timeout=20)
            assert not thread.is_alive()


class RawClient:
    """A session of a client, and one training run in it."""

    def __init__(self, url: str, key: str = "tml-any") -> None:
        self.http = httpx.Client(base_url=f"{url}/api/v1", headers={"x-api-key": key}, timeout=60)
        self.session = self.post("create_session", tags=[], user_metadata=None, sdk_version="0.38.0")["session_id"]
        self.run = ""
        self._number = 0
        self._samplers = 0

    def post(self, route: str, /, **body: Any) -> dict[str, Any]:
        """The JSON answer of a route."""
        response = self.http.post(route, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def error(self, route: str, /, **body: Any) -> tuple[int, str]:
        """Status and message of a refusal."""
        response = self.http.post(route, json=body)
        return response.status_code, response.json()["error"]["message"]

    def wait(self, begun: Mapping[str, Any]) -> Any:
        """The answer to a request: JSON, or the bytes of a message."""
        response = self.http.post("retrieve_future", json={"request_id": begun["request_id"], "allow_metadata_only": True})
        if response.headers["content-type"] == PROTOBUF:
            return response.content
        return response.json()

    def create(self, rank: int = 4, seed: int = 1, base_model: str = "tiny", **lora: Any) -> dict[str, Any]:
        """Begin the training run."""
        asked = {"rank": rank, "seed": seed, **lora}
        body = {"session_id": self.session, "model_seq_id": 0, "base_model": base_model, "lora_config": asked}
        answer = self.wait(self.post("create_model", **body))
        self.run = answer["model_id"]
        return answer

    def next_number(self) -> int:
        """The number of the run's next request."""
        self._number += 1
        return self._number

    def send_loss(
        self, data: Sequence[Datum], loss: str = "cross_entropy", number: int | None = None, *, forward_only: bool = False
    ) -> dict[str, Any]:
        """Begin the computation of a loss."""
        request = messages()["ForwardBackwardRequest"](
            model_id=self.run, seq_id=number or self.next_number(), loss_fn=loss, forward_only=forward_only
        )
        for datum in data:
            message = request.data.add()
            message.model_input.add().encoded_text.tokens = datum.tokens_T.astype("<i4").tobytes()
            for name, values in datum.inputs.items():
                tensor = message.loss_fn_inputs[name]
                tensor.dtype = INTEGER if values.dtype.kind == "i" else FLOAT
                tensor.dense = values.astype("<i8" if values.dtype.kind == "i" else "<f4").tobytes()
                tensor.shape.extend(values.shape)
        response = self.http.post("forward_backward", content=request.SerializeToString(), headers={"content-type": PROTOBUF})
        assert response.status_code == 200, response.text
        return response.json()

    def loss(self, data: Sequence[Datum], loss: str = "cross_entropy", **options: Any) -> tuple[float, list[np.ndarray]]:
        """A loss, and the log-probabilities of each example's targets."""
        answer = self.wait(self.send_loss(data, loss, **options))
        assert isinstance(answer, bytes), answer
        return read_loss(answer)

    def step(self, number: int | None = None, **adam: float) -> dict[str, Any]:
        """Update the weights."""
        return self.wait(self.send_step(number, **adam))

    def send_step(self, number: int | None = None, **adam: float) -> dict[str, Any]:
        return self.post("optim_step", model_id=self.run, seq_id=number or self.next_number(), adam_params=adam)

    def save(self, name: str, route: str = "save_weights", **more: Any) -> dict[str, Any]:
        """Save the weights under a name."""
        return self.wait(self.post(route, model_id=self.run, path=name, seq_id=self.next_number(), **more))

    def sampler(self, **body: Any) -> str:
        """A sampling session: of the run's weights now, or of what `body` names."""
        self._samplers += 1
        if body:
            body |= {"session_id": self.session, "sampling_session_seq_id": self._samplers}
            return self.post("create_sampling_session", **body)["sampling_session_id"]
        begun = self.post(
            "save_weights_for_sampler",
            model_id=self.run,
            seq_id=self.next_number(),
            sampling_session_seq_id=self._samplers,
            kind="snapshot",
        )
        return self.wait(begun)["sampling_session_id"]

    def sample(self, session: str, tokens: Sequence[int], number: int = 0, samples: int = 1, **params: Any) -> Any:
        """The message of samples, or the error of a request."""
        options = {name: params.pop(name) for name in list(params) if name.startswith(("prompt_", "topk_"))}
        begun = self.post(
            "asample",
            sampling_session_id=session,
            seq_id=number,
            num_samples=samples,
            prompt={"chunks": [{"type": "encoded_text", "tokens": list(tokens)}]},
            sampling_params=params,
            **options,
        )
        answer = self.wait(begun)
        if not isinstance(answer, bytes):
            return answer
        message = messages()["SampleResponse"]()
        message.ParseFromString(answer)
        return message


def read_loss(answer: bytes) -> tuple[float, list[np.ndarray]]:
    """A message of a loss: its sum, and the log-probabilities of each example's targets."""
    message = messages()["ForwardBackwardOutput"]()
    message.ParseFromString(answer)
    found = []
    for record in message.loss_fn_outputs:
        field = record.fields["logprobs"]
        values, offsets = np.frombuffer(field.data, "<f4"), np.frombuffer(field.offsets, "<i8") // 4
        found += [values[start:end].reshape(-1, *field.trailing_shape) for start, end in pairwise(offsets)]
    return message.metrics["loss:sum"], found
