"""What a Tinker server holds: clients' sessions, their training runs and sampling sessions, and what each request does to them.

A session without requests for a while is ended, and its runs leave the memory; saved weights stay. All methods except those of
runs and states are called on the event loop.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bessemer.core.errors import RequestError
from bessemer.inference.config import EngineConfig
from bessemer.inference.engine import Engine
from bessemer.serving.runtime.bodies import ApiError
from bessemer.serving.runtime.clients import Caller
from bessemer.serving.tinker.config import MOST_SAMPLING, UPKEEP_SECONDS, TinkerLimits
from bessemer.serving.tinker.futures import Answers, TrainingThread, Turns
from bessemer.serving.tinker.protocol import CreateModel, CreateSamplingSession, LoadWeights, OptimStep, Sample, SaveWeights
from bessemer.serving.tinker.sampling import Samplers, SamplingSession
from bessemer.serving.tinker.states import Address, RunRecord, SavedWeights, StateStore
from bessemer.serving.tinker.training import BaseModel, LoraSettings, LossResult, TrainingRun
from bessemer.serving.tinker.wire import ForwardBackward, write_forward_backward_output


@dataclass(eq=False)
class Session:
    """A client's session. seen: when it was last heard of, by `time.monotonic`."""

    id: str
    owner: str
    user_metadata: Mapping[str, Any]
    display_name: str | None = None
    seen: float = field(default_factory=time.monotonic)
    runs: list[str] = field(default_factory=list)
    samplers: list[str] = field(default_factory=list)


@dataclass(eq=False)
class LiveRun:
    """A training run in memory. run: None until it is made."""

    record: RunRecord
    turns: Turns
    run: TrainingRun | None = None


class Begun(NamedTuple):
    """A request that has begun: its id, the id of its run, and the ids of its samples."""

    request_id: str
    model_id: str | None = None
    sample_sequence_ids: list[str] | None = None


class TinkerService:
    """The state behind the routes."""

    def __init__(
        self,
        base: BaseModel,
        name: str,
        states: StateStore,
        *,
        aliases: tuple[str, ...] = (),
        limits: TinkerLimits | None = None,
        engine: EngineConfig | None = None,
    ) -> None:
        """name, aliases: clients name the base model by one of these, or by its folder. Raises ConfigError as `Engine`."""
        self.base = base
        self.name = name
        self.aliases = aliases
        self.limits = limits or TinkerLimits()
        self.states = states
        self.engine = Engine(base.served(), base.tokenizer, config=engine)
        self.answers = Answers()
        self.samplers = Samplers(self.engine, states, most_adapters=self.limits.max_adapters, snapshots=self.limits.snapshots)
        self.is_draining = False
        self._thread = TrainingThread()
        self._sessions: dict[str, Session] = {}
        self._runs: dict[str, LiveRun] = {}
        self._sampling: dict[str, SamplingSession] = {}

    # -- the server

    @property
    def requests(self) -> int:
        """Requests under way."""
        return self.answers.under_way

    def drain(self) -> None:
        """Refuse new requests."""
        self.is_draining = True

    def close(self) -> None:
        """End all requests, and the thread of training after its step."""
        self.answers.close()
        self._thread.close()

    async def keep_up(self) -> None:
        """End sessions that are silent, and delete weights that have expired, until cancelled."""
        while True:
            oldest = time.monotonic() - 60 * self.limits.idle_minutes
            for session in [each for each in self._sessions.values() if each.seen < oldest]:
                await self.end_session(session.id, session.owner)
            await asyncio.to_thread(self.states.remove_expired)
            await asyncio.sleep(UPKEEP_SECONDS)

    def is_base(self, model: str) -> bool:
        """Whether a client's name is that of the base model: its name, an alias, or its folder."""
        if model in (self.name, *self.aliases):
            return True
        # a client on this machine may name the folder itself, as its tokenizer
        return len(model) < 4096 and "\0" not in model and Path(model).resolve() == self.base.folder.resolve()

    # -- sessions

    def add_session(self, owner: str, user_metadata: Mapping[str, Any] | None, display_name: str | None) -> Session:
        session = Session(secrets.token_hex(16), owner, user_metadata or {}, display_name)
        self._sessions[session.id] = session
        return session

    def session(self, id: str, owner: str) -> Session:
        """A client's session; the call counts as a sign of life. Raises ApiError (404)."""
        session = self._sessions.get(id)
        if session is None or session.owner != owner:
            raise ApiError(f"there is no session {id[:80]!r}: it ended, or the server was restarted", status=404)
        session.seen = time.monotonic()
        return session

    def sessions(self, owner: str) -> list[Session]:
        return [session for session in self._sessions.values() if session.owner == owner]

    async def end_session(self, id: str, owner: str) -> None:
        """End a session: its runs leave the memory after their current step. Raises as `session`."""
        session = self.session(id, owner)
        del self._sessions[id]
        for run in session.runs:
            await self.unload(run)
        for sampler in session.samplers:
            self._sampling.pop(sampler, None)

    # -- training runs

    def live_run(self, id: str, owner: str) -> LiveRun:
        """A run in memory. Raises ApiError (404)."""
        live = self._runs.get(id)
        if live is None or live.record.owner != owner:
            raise ApiError(
                f"there is no training run {id[:80]!r} in memory: its session has ended, or the server was restarted; go on "
                "from its saved weights by create_training_client_from_state_with_optimizer",
                status=404,
            )
        self.session(id.partition(":")[0], owner)
        return live

    async def unload(self, id: str) -> None:
        """Let a run leave the memory."""
        live = self._runs.pop(id, None)
        if live is not None:
            live.turns.close()
            await self._thread.run_now(partial(self._forget, live))

    def _forget(self, live: LiveRun) -> None:
        live.run = None
        self.samplers.drop_run(live.record.id)

    def create_model(self, body: CreateModel, owner: str) -> Begun:
        """Begin a new run."""
        if not self.is_base(body.base_model):
            raise ApiError(f"base_model {body.base_model[:200]!r}: this server has {self.name!r} alone", status=404)
        if body.lora_config is None:
            raise ApiError("lora_config: this server trains adapters; say their rank")
        asked = body.lora_config
        seed = secrets.randbits(63) if asked.seed is None else asked.seed
        lora = LoraSettings(asked.rank, seed, asked.train_attn, asked.train_mlp)
        live, is_new = self._new_run(body.session_id, body.model_seq_id, owner, body.base_model, body.user_metadata, lora)

        async def create() -> dict[str, Any]:
            await self._created(live)
            return {"type": "create_model", "model_id": live.record.id}

        return self._begin(live, 0, "create_model", create if is_new else _unreachable)

    def _new_run(
        self, session_id: str, number: int, owner: str, base_model: str, metadata: Mapping[str, Any] | None, lora: LoraSettings
    ) -> tuple[LiveRun, bool]:
        """The run that is number `number` of a session, and whether it is new. Its first request makes it."""
        session = self.session(session_id, owner)
        id = f"{session_id}:train:{number}"
        if id in self._runs:
            return self._runs[id], False
        if len(self._runs) >= self.limits.max_runs:
            raise ApiError(
                f"this server holds {self.limits.max_runs} training runs at once (--max-runs); end a session, or wait for one "
                "to end"
            )
        now = time.time()
        live = LiveRun(RunRecord(id, owner, base_model, lora, dict(metadata or {}), now, now), Turns())
        self._runs[id] = live
        session.runs.append(id)
        return live, True

    async def _created(self, live: LiveRun, saved: SavedWeights | None = None, *, with_optimizer: bool = False) -> None:
        """Make a new run, perhaps from saved weights. Where that fails, there is no run."""

        def make() -> TrainingRun:
            run = TrainingRun(self.base, live.record.lora)
            if saved is not None:
                run.load_state(self.states.load_state(saved.address), steps=saved.steps, with_optimizer=with_optimizer)
            self.states.add_run(live.record)
            return run

        try:
            live.run = await self._thread.run_now(make)
        except BaseException:
            self._runs.pop(live.record.id, None)
            live.turns.close()
            raise

    def forward_backward(self, request: ForwardBackward, caller: Caller) -> Begun:
        """Begin the computation of a loss."""
        live = self.live_run(request.model_id, caller.client.id)

        def compute() -> bytes:
            run = self._ready(live)
            compute_loss = run.forward if request.forward_only else run.forward_backward
            result: LossResult = compute_loss(request.data(), request.loss, request.config)
            caller.spend(prompt=result.tokens)
            return write_forward_backward_output({"logprobs": result.log_probs}, {"loss:sum": result.loss})

        return self._in_turn(live, request.seq_id or None, "forward_backward", compute)

    def optim_step(self, body: OptimStep, owner: str) -> Begun:
        """Begin an optimizer step."""
        live = self.live_run(body.model_id, owner)

        def step() -> dict[str, Any]:
            norm = self._ready(live).optim_step(body.adam_params.settings())
            return {"type": "optim_step", "metrics": {"grad_norm": norm}}

        return self._in_turn(live, body.seq_id, "optim_step", step)

    def save_state(self, body: SaveWeights, owner: str) -> Begun:
        """Begin to save a run's state, from which training can continue."""
        live = self.live_run(body.model_id, owner)

        def save() -> dict[str, Any]:
            run, name = self._ready(live), body.path or f"{live.turns.next:06d}"
            more = {"expires": expiry(body.ttl_seconds), "user_metadata": body.user_metadata}
            saved = self.states.save_state(live.record, name, run.state(), steps=run.steps, overwrite=body.overwrite, **more)
            return {"type": "save_weights", "path": str(saved.address)}

        return self._in_turn(live, body.seq_id, "save_weights", save)

    def save_for_sampler(self, body: SaveWeights, owner: str) -> Begun:
        """Begin to save a run's weights for sampling: under a name, or only for a sampling session."""
        live = self.live_run(body.model_id, owner)
        session = self.session(live.record.id.partition(":")[0], owner)
        sampler = f"{session.id}:sample:{body.sampling_session_seq_id or 0}"

        def save() -> dict[str, Any]:
            run = self._ready(live)
            answer: dict[str, Any] = {"type": "save_weights_for_sampler"}
            if body.path is not None:
                more = {"expires": expiry(body.ttl_seconds), "user_metadata": body.user_metadata}
                saved = self.states.save_sampler(
                    live.record, body.path, run.adapter(), self.base.model, steps=run.steps, **more
                )
                return answer | {"path": str(saved.address)}
            if body.kind == "inflight":
                adapter = self.samplers.follow(live.record.id, run.adapter())
            else:
                adapter = self.samplers.add_snapshot(live.record.id, sampler, run.adapter())
            self._sampling[sampler] = SamplingSession(sampler, owner, live.record.base_model, adapter)
            return answer | {"sampling_session_id": sampler}

        session.samplers.append(sampler)
        return self._in_turn(live, body.seq_id, "save_weights_for_sampler", save)

    def load_state(self, body: LoadWeights, owner: str) -> Begun:
        """Begin to load saved weights, into a run or as a new one."""
        saved = self.saved(body.path, owner)
        if body.model_id is not None:
            live = self.live_run(body.model_id, owner)

            def load() -> dict[str, Any]:
                tensors = self.states.load_state(saved.address)
                self._ready(live).load_state(tensors, steps=saved.steps, with_optimizer=body.optimizer)
                return {"type": "load_weights", "path": body.path, "model_id": live.record.id}

            return self._in_turn(live, body.seq_id, "load_weights", load)
        if body.session_id is None or body.model_seq_id is None:
            raise ApiError("load_weights needs model_id and seq_id, or session_id and model_seq_id")
        base_model = body.base_model or saved.base_model
        if not self.is_base(base_model):
            raise ApiError(f"{body.path}: weights of {base_model[:200]!r}, and this server has {self.name!r}", status=404)
        live, is_new = self._new_run(body.session_id, body.model_seq_id, owner, base_model, body.user_metadata, saved.lora)

        async def create() -> dict[str, Any]:
            await self._created(live, saved, with_optimizer=body.optimizer)
            return {"type": "load_weights", "path": body.path, "model_id": live.record.id}

        return self._begin(live, 0, "load_weights", create if is_new else _unreachable)

    def refuse(self, run: Any, number: Any, owner: str, error: Exception) -> Begun | None:
        """Begin a refused request in its turn; None where it belongs to no run."""
        live = self._runs.get(run) if isinstance(run, str) else None
        if live is None or live.record.owner != owner or not isinstance(number, int) or number < live.turns.next:
            return None

        def fail() -> dict[str, Any]:
            raise error

        return self._in_turn(live, number, "refused", fail)

    # -- saved weights

    def saved(self, text: str, owner: str) -> SavedWeights:
        """Saved weights of an owner by their address. Raises RequestError."""
        address = Address.parse(text)
        self.states.run(address.run, owner)
        return self.states.find(address)

    def remove(self, text: str, owner: str) -> None:
        """Delete saved weights. Raises as `saved`."""
        saved = self.saved(text, owner)
        self.states.remove(saved.address)
        self.samplers.drop_saved(saved.address)

    # -- sampling

    def add_sampling_session(self, body: CreateSamplingSession, owner: str) -> SamplingSession:
        """A session that samples from the base model or from saved weights. Raises ApiError and RequestError."""
        session = self.session(body.session_id, owner)
        id = f"{session.id}:sample:{body.sampling_session_seq_id}"
        if id in self._sampling:
            return self._sampling[id]
        sampling = self._sampler_of(id, owner, body.model_path, body.base_model)
        self._sampling[id] = sampling
        session.samplers.append(id)
        return sampling

    def _sampler_of(self, id: str, owner: str, model_path: str | None, base_model: str | None) -> SamplingSession:
        if model_path is not None:
            saved = self.saved(model_path, owner)
            if saved.address.kind != "sampler_weights":
                raise RequestError(
                    f"{model_path}: these weights are for training; sample from those of save_weights_for_sampler"
                )
            return SamplingSession(id, owner, saved.base_model, address=saved.address)
        if base_model is None or not self.is_base(base_model):
            raise ApiError(f"base_model {str(base_model)[:200]!r}: this server has {self.name!r} alone", status=404)
        return SamplingSession(id, owner, base_model)

    def sampler(self, id: str, owner: str) -> SamplingSession:
        """A sampling session. Raises ApiError (404)."""
        sampling = self._sampling.get(id)
        if sampling is None or sampling.owner != owner:
            raise ApiError(f"there is no sampling session {id[:80]!r}: its session has ended", status=404)
        return sampling

    def sample(self, body: Sample, caller: Caller) -> Begun:
        """Begin to sample."""
        self._check_open()
        if self.samplers.requests >= MOST_SAMPLING:
            raise ApiError(
                "the server has too many samples to make; try again in a moment", status=429, kind="rate_limit_error"
            )
        owner = caller.client.id
        if body.sampling_session_id is not None:
            sampling = self.sampler(body.sampling_session_id, owner)
            id = f"{sampling.id}:{secrets.token_hex(8) if body.seq_id is None else body.seq_id}"
        else:
            id = f"sample:{secrets.token_hex(16)}"
            sampling = self._sampler_of(id, owner, body.model_path, body.base_model)

        async def draw() -> bytes:
            answer, prompt, completion = await self.samplers.sample(sampling, body, caller.client.salt)
            caller.spend(prompt=prompt, completion=completion)
            return answer

        self.answers.begin(id, owner, draw, may_end=True)
        return Begun(id, None, [f"{id}:{number}" for number in range(body.num_samples)])

    # -- inside

    def _check_open(self) -> None:
        if self.is_draining:
            raise ApiError("the server is stopping", status=503, kind="server_error")

    def _ready(self, live: LiveRun) -> TrainingRun:
        if live.run is None:
            raise RequestError("this training run has ended; go on from its saved weights in a new one")
        live.record.used = time.time()
        return live.run

    def _in_turn(self, live: LiveRun, number: int | None, what: str, work: Callable[[], dict[str, Any] | bytes]) -> Begun:
        async def compute() -> dict[str, Any] | bytes:
            result: dict[str, Any] | bytes = await self._thread.run(live.turns, number, work)
            return result

        name = f"{what}:{secrets.token_hex(8)}" if number is None else str(number)
        return self._begin(live, name, what, compute)

    def _begin(
        self, live: LiveRun, number: int | str, what: str, work: Callable[[], Awaitable[dict[str, Any] | bytes]]
    ) -> Begun:
        self._check_open()
        id = self.answers.begin(f"{live.record.id}:{number}", live.record.owner, work)
        return Begun(id, live.record.id)


def expiry(ttl_seconds: int | None) -> float | None:
    """When weights expire, in seconds since 1970."""
    return None if ttl_seconds is None else time.time() + ttl_seconds


async def _unreachable() -> dict[str, Any]:
    raise AssertionError("a run that there is has begun its first request")
