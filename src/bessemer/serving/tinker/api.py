"""The routes of the Tinker API, as `tinker` 0.38 calls them.

A request that takes time is answered with an id at once. `retrieve_future` returns its result: JSON or, for losses and samples,
a message of protocol buffers. If the result is not ready after some seconds, the route answers 408, and the client asks again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from bessemer.core.errors import BessemerError, RequestError
from bessemer.serving.runtime.bodies import ApiError, Body, read_body, read_json
from bessemer.serving.runtime.clients import caller_of
from bessemer.serving.tinker.protocol import (
    CreateModel,
    CreateSamplingSession,
    CreateSession,
    Expiry,
    LoadWeights,
    ModelBody,
    OptimStep,
    RequestId,
    Sample,
    SaveWeights,
    SessionBody,
    WeightsAddress,
    described_checkpoint,
    described_lora,
    described_run,
    texts_of,
)
from bessemer.serving.tinker.service import Begun, TinkerService, expiry
from bessemer.serving.tinker.states import Address, RunRecord
from bessemer.serving.tinker.wire import PROTOBUF, read_forward_backward

PREFIX = "/api/v1"
Route = Callable[..., Awaitable[Any]]
Numbered = TypeVar("Numbered", bound=Body)
#: Settings that the client takes from the server. Chunks of a request stay below the largest body.
_CLIENT_CONFIG = {
    "pjwt_auth_enabled": False,
    "proto_compress_fwdbwd": False,
    "fwdbwd_max_chunk_bytes_count": 4_000_000,
    "use_pyqwest_transport": False,
    "sample_use_retrieve_futures": False,
    "custom_loss_server_side": False,
    "sample_join_sampling_session": True,
    # with a long queue on a slow machine no answer may come for minutes
    "sample_enable_stuck_detection": False,
}
_NOTE = "this server trains LoRA of attention and feed-forward layers; train_unembed has no effect"
#: Most items of a list in one answer.
_PAGE = 1_000


class TinkerApi:
    """The routes over a service."""

    def __init__(self, service: TinkerService) -> None:
        self.service = service
        self._clones = 0

    def router(self) -> APIRouter:
        router = APIRouter(prefix=PREFIX)
        posted: dict[str, Route] = {
            "/client/config": self.client_config,
            "/client/dynamic_config": self.dynamic_config,
            "/create_session": self.create_session,
            "/session_heartbeat": self.heartbeat,
            "/sessions/{session_id}/finish": self.finish_session,
            "/create_model": self.create_model,
            "/get_info": self.get_info,
            "/unload_model": self.unload_model,
            "/forward_backward": self.forward_backward,
            "/optim_step": self.optim_step,
            "/save_weights": self.save_weights,
            "/save_weights_for_sampler": self.save_weights_for_sampler,
            "/load_weights": self.load_weights,
            "/weights_info": self.weights_info,
            "/create_sampling_session": self.create_sampling_session,
            "/join_sampling_session": self.join_sampling_session,
            "/asample": self.sample,
            "/retrieve_future": self.retrieve_future,
            "/cancel_future": self.cancel_future,
            "/telemetry": self.telemetry,
        }
        read: dict[str, Route] = {
            "/healthz": self.health,
            "/get_server_capabilities": self.capabilities,
            "/sessions": self.sessions,
            "/sessions/{session_id}": self.session,
            "/samplers/{sampler_id}": self.sampler,
            "/training_runs": self.training_runs,
            "/training_runs/{run_id}": self.training_run,
            "/training_runs/{run_id}/checkpoints": self.checkpoints,
            "/checkpoints": self.all_checkpoints,
        }
        for method, routes in (("POST", posted), ("GET", read)):
            for path, answer in routes.items():
                router.add_api_route(path, answer, methods=[method])
        one = "/training_runs/{run_id}/checkpoints/{kind}/{name}"
        router.add_api_route(one, self.delete_checkpoint, methods=["DELETE"])
        router.add_api_route(one + "/ttl", self.set_expiry, methods=["PUT"])
        return router

    # -- the server

    async def health(self) -> dict[str, str]:
        return {"status": "ok"}

    async def client_config(self) -> dict[str, Any]:
        return _CLIENT_CONFIG | {"sample_max_concurrent_requests": 4 * self.service.engine.max_num_seqs}

    async def dynamic_config(self) -> dict[str, Any]:
        return {"refresh_interval_sec": 3600, "sample_cancel_enabled": True}

    async def capabilities(self) -> dict[str, Any]:
        names = dict.fromkeys((self.service.name, *self.service.aliases))
        longest = self.service.engine.context_length
        model = {"max_context_length": longest, "trainable": True, "sampleable": True}
        return {"supported_models": [{"model_name": name, **model} for name in names]}

    async def telemetry(self) -> dict[str, str]:
        """Accept the client's telemetry, and drop it."""
        return {"status": "accepted"}

    # -- sessions

    async def create_session(self, request: Request) -> dict[str, Any]:
        body = await read_body(CreateSession, request)
        session = self.service.add_session(_owner(request), body.user_metadata, body.display_name)
        return {"type": "create_session", "session_id": session.id, "info_message": _NOTE}

    async def heartbeat(self, request: Request) -> dict[str, str]:
        body = await read_body(SessionBody, request)
        self.service.session(body.session_id, _owner(request))
        return {"type": "session_heartbeat"}

    async def finish_session(self, session_id: str, request: Request) -> Response:
        await self.service.end_session(session_id, _owner(request))
        return Response(status_code=204)

    async def sessions(self, request: Request, limit: int = _PAGE, offset: int = 0) -> dict[str, Any]:
        ids = [session.id for session in self.service.sessions(_owner(request))]
        return {"sessions": ids[_part(offset, limit)]}

    async def session(self, session_id: str, request: Request) -> dict[str, Any]:
        session = self.service.session(session_id, _owner(request))
        return {
            "training_run_ids": session.runs,
            "sampler_ids": session.samplers,
            "user_metadata": texts_of(session.user_metadata) or None,
            "display_name": session.display_name,
        }

    # -- training

    async def create_model(self, request: Request) -> dict[str, Any]:
        return _begun(self.service.create_model(await read_body(CreateModel, request), _owner(request)))

    async def get_info(self, request: Request) -> dict[str, Any]:
        body = await read_body(ModelBody, request)
        record = self.service.live_run(body.model_id, _owner(request)).record
        return {
            "type": "get_info",
            # the client loads the tokenizer by this name
            "model_data": {"arch": "decoder", "model_name": record.base_model, "tokenizer_id": None},
            "model_id": record.id,
            "is_lora": True,
            "lora_rank": record.lora.rank,
            "model_name": record.base_model,
        }

    async def unload_model(self, request: Request) -> dict[str, Any]:
        body = await read_body(ModelBody, request)
        live = self.service.live_run(body.model_id, _owner(request))

        async def unload() -> dict[str, Any]:
            await self.service.unload(live.record.id)
            return {"type": "unload_model", "model_id": live.record.id}

        id = self.service.answers.begin(f"{live.record.id}:unload", live.record.owner, unload)
        return _begun(Begun(id, live.record.id))

    async def forward_backward(self, request: Request) -> dict[str, Any]:
        if not request.headers.get("content-type", "").startswith(PROTOBUF):
            raise ApiError(f"forward_backward takes a body of {PROTOBUF}; this server speaks to tinker 0.38", status=415)
        read = await asyncio.to_thread(read_forward_backward, await request.body())
        return _begun(self.service.forward_backward(read, caller_of(request)))

    async def optim_step(self, request: Request) -> dict[str, Any]:
        return await self._in_turn(OptimStep, self.service.optim_step, request)

    async def save_weights(self, request: Request) -> dict[str, Any]:
        return await self._in_turn(SaveWeights, self.service.save_state, request)

    async def save_weights_for_sampler(self, request: Request) -> dict[str, Any]:
        return await self._in_turn(SaveWeights, self.service.save_for_sampler, request)

    async def load_weights(self, request: Request) -> dict[str, Any]:
        return await self._in_turn(LoadWeights, self.service.load_state, request)

    async def _in_turn(self, kind: type[Numbered], begin: Callable[[Numbered, str], Begun], request: Request) -> dict[str, Any]:
        """Begin a request that has a number in its run. A refused request takes its turn too, with the refusal as its result:
        else the later requests of the run would wait for ever."""
        owner = _owner(request)
        try:
            return _begun(begin(await read_body(kind, request), owner))
        except (ApiError, BessemerError) as error:
            values = read_json(await request.body())
            refused = self.service.refuse(values.get("model_id"), values.get("seq_id"), owner, error)
            if refused is None:
                raise
            return _begun(refused)

    # -- sampling

    async def create_sampling_session(self, request: Request) -> dict[str, Any]:
        body = await read_body(CreateSamplingSession, request)
        sampling = self.service.add_sampling_session(body, _owner(request))
        return {"type": "create_sampling_session", "sampling_session_id": sampling.id}

    async def join_sampling_session(self, request: Request) -> dict[str, Any]:
        """A number for a client in another process, from which that client numbers its requests."""
        self._clones += 1
        return {"type": "join_sampling_session", "client_counter": self._clones}

    async def sampler(self, sampler_id: str, request: Request) -> dict[str, Any]:
        sampling = self.service.sampler(sampler_id, _owner(request))
        path = None if sampling.address is None else str(sampling.address)
        return {"sampler_id": sampling.id, "base_model": sampling.base_model, "model_path": path}

    async def sample(self, request: Request) -> dict[str, Any]:
        return _begun(self.service.sample(await read_body(Sample, request), caller_of(request)))

    # -- answers

    async def retrieve_future(self, request: Request) -> Response:
        body = await read_body(RequestId, request)
        answer = await self.service.answers.answer(body.request_id, _owner(request))
        if answer is None:
            waiting = {"type": "try_again", "request_id": body.request_id, "queue_state": "active"}
            return JSONResponse(waiting, status_code=408)
        if isinstance(answer.value, bytes):
            return Response(answer.value, media_type=PROTOBUF)
        return JSONResponse(answer.value)

    async def cancel_future(self, request: Request) -> Response:
        body = await read_body(RequestId, request)
        self.service.answers.cancel(body.request_id, _owner(request))
        return Response(status_code=204)

    # -- saved weights

    async def weights_info(self, request: Request) -> dict[str, Any]:
        body = await read_body(WeightsAddress, request)
        return described_lora(await asyncio.to_thread(self.service.saved, body.tinker_path, _owner(request)))

    async def training_runs(self, request: Request, limit: int = 20, offset: int = 0) -> dict[str, Any]:
        records = await asyncio.to_thread(self.service.states.runs, _owner(request))
        shown = records[_part(offset, limit)]
        described = await asyncio.to_thread(lambda: [self._described(record) for record in shown])
        return {"training_runs": described, "cursor": {"offset": offset, "limit": limit, "total_count": len(records)}}

    async def training_run(self, run_id: str, request: Request) -> dict[str, Any]:
        record = await asyncio.to_thread(self._record, run_id, _owner(request))
        return await asyncio.to_thread(self._described, record)

    async def checkpoints(self, run_id: str, request: Request) -> dict[str, Any]:
        await asyncio.to_thread(self._record, run_id, _owner(request))
        saved = await asyncio.to_thread(self.service.states.checkpoints, run_id)
        return {"checkpoints": [described_checkpoint(each) for each in saved]}

    async def all_checkpoints(self, request: Request, limit: int = 100, offset: int = 0) -> dict[str, Any]:
        states = self.service.states
        records = await asyncio.to_thread(states.runs, _owner(request))
        saved = await asyncio.to_thread(lambda: [each for record in records for each in states.checkpoints(record.id)])
        shown = sorted(saved, key=lambda each: -each.time)[_part(offset, limit)]
        cursor = {"offset": offset, "limit": limit, "total_count": len(saved)}
        return {"checkpoints": [described_checkpoint(each) for each in shown], "cursor": cursor}

    async def delete_checkpoint(self, run_id: str, kind: str, name: str, request: Request) -> Response:
        await asyncio.to_thread(_as_missing, self.service.saved, f"tinker://{run_id}/{kind}/{name}", _owner(request))
        self.service.remove(f"tinker://{run_id}/{kind}/{name}", _owner(request))
        return Response(status_code=204)

    async def set_expiry(self, run_id: str, kind: str, name: str, request: Request) -> Response:
        body = await read_body(Expiry, request)
        text = f"tinker://{run_id}/{kind}/{name}"
        await asyncio.to_thread(_as_missing, self.service.saved, text, _owner(request))
        await asyncio.to_thread(self.service.states.set_expiry, Address.parse(text), expiry(body.ttl_seconds))
        return Response(status_code=204)

    # -- inside

    def _record(self, run_id: str, owner: str) -> RunRecord:
        record: RunRecord = _as_missing(self.service.states.run, run_id, owner)
        return record

    def _described(self, record: RunRecord) -> dict[str, Any]:
        return described_run(record, self.service.states.checkpoints(record.id))


def _owner(request: Request) -> str:
    return caller_of(request).client.id


def _part(offset: int, limit: int) -> slice:
    return slice(max(offset, 0), max(offset, 0) + min(max(limit, 0), _PAGE))


def _as_missing(find: Any, *arguments: Any) -> Any:
    """What `find` gives. Raises ApiError (404) in place of RequestError."""
    try:
        return find(*arguments)
    except RequestError as error:
        raise ApiError(str(error), status=404) from None


def _begun(begun: Begun) -> dict[str, Any]:
    return {name: value for name, value in begun._asdict().items() if value is not None}
