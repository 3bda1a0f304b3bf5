"""Tinker's requests in JSON, and the parts of its answers that several routes give.

Clients send all fields, also those with default values. A field that this server does not know is refused by name, unless its
value is null, false, 0 or empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from bessemer.core.errors import RequestError
from bessemer.serving.config import METADATA_VALUE, NAME, STOPS
from bessemer.serving.runtime.bodies import Body
from bessemer.serving.tinker.config import MOST_LIKELIEST, MOST_SAMPLES
from bessemer.serving.tinker.states import RunRecord, SavedWeights, iso_time
from bessemer.serving.tinker.training import AdamSettings

Text = Annotated[str, Field(max_length=NAME.most)]
#: Numbers of a client's own requests and objects.
Number = Annotated[int, Field(ge=0, lt=1 << 62)]
_Real = Annotated[float, Field(allow_inf_nan=False)]
#: A client's own notes on its runs and weights.
Metadata = Annotated[dict[Text, Any], Field(max_length=64)]


class TinkerBody(Body):
    """A body of the Tinker API."""

    @model_validator(mode="before")
    @classmethod
    def _without_empty_extras(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        # `type` repeats the kind of the body
        return {name: value for name, value in values.items() if name in cls.model_fields or (value and name != "type")}


class CreateSession(TinkerBody):
    """A client begins."""

    tags: list[Text] = Field(default_factory=list, max_length=64)
    user_metadata: Metadata | None = None
    sdk_version: Text = ""
    project_id: Text | None = None
    display_name: Text | None = None


class SessionBody(TinkerBody):
    """A session."""

    session_id: Text


class LoraConfig(TinkerBody):
    """The adapter that a run trains. train_unembed is accepted without effect; the reply of
    `create_session` says so."""

    rank: int
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class OptimizerConfig(TinkerBody):
    """A run's optimizer."""

    type: Literal["adamw"] = "adamw"


class CreateModel(TinkerBody):
    """A new run. Its first request has the number 0, those after it count from 1."""

    session_id: Text
    model_seq_id: Number
    base_model: Text
    user_metadata: Metadata | None = None
    lora_config: LoraConfig | None = None
    optimizer_config: OptimizerConfig | None = None


class ModelBody(TinkerBody):
    """A run."""

    model_id: Text


class AdamParams(TinkerBody):
    """AdamW's numbers for one step."""

    learning_rate: Annotated[_Real, Field(ge=0)] = 1e-4
    beta1: Annotated[_Real, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[_Real, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[_Real, Field(ge=0)] = 1e-12
    weight_decay: Annotated[_Real, Field(ge=0)] = 0.0
    grad_clip_norm: Annotated[_Real, Field(ge=0)] = 0.0

    def settings(self) -> AdamSettings:
        return AdamSettings(**self.model_dump())


class OptimStep(TinkerBody):
    """Update the weights by the gradients since the last step."""

    model_id: Text
    seq_id: Number | None = None
    adam_params: AdamParams


class SaveWeights(TinkerBody):
    """path: a name for the weights; without one, `save_weights_for_sampler` does not keep them, and makes a sampling
    session."""

    model_id: Text
    seq_id: Number | None = None
    path: Text | None = None
    ttl_seconds: Annotated[int, Field(gt=0)] | None = None
    overwrite: bool = False
    user_metadata: Annotated[dict[Text, Annotated[str, Field(max_length=METADATA_VALUE.most)]], Field(max_length=64)] | None = (
        None
    )
    sampling_session_seq_id: Number | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"


class LoadWeights(TinkerBody):
    """Load saved weights into an existing run (`model_id`) or into a new one (`session_id` and `model_seq_id`)."""

    path: Text
    optimizer: bool
    model_id: Text | None = None
    seq_id: Number | None = None
    session_id: Text | None = None
    model_seq_id: Number | None = None
    base_model: Text | None = None
    user_metadata: Metadata | None = None
    optimizer_config: OptimizerConfig | None = None
    weights_access_token: Text | None = None


class CreateSamplingSession(TinkerBody):
    """Sample from the base model (`base_model`), or from saved weights (`model_path`)."""

    session_id: Text
    sampling_session_seq_id: Number
    base_model: Text | None = None
    model_path: Text | None = None


class Chunk(TinkerBody):
    """Some tokens of an input."""

    tokens: list[Number] | None = None


class ModelInput(TinkerBody):
    """An input."""

    chunks: list[Chunk] = Field(max_length=10_000)

    def token_ids(self) -> list[int]:
        """Raises RequestError for pictures and sound."""
        if any(chunk.tokens is None for chunk in self.chunks):
            raise RequestError("prompt: this server reads text, and the prompt has a picture or sound; leave it out")
        return [token for chunk in self.chunks for token in chunk.tokens or ()]


class SamplingParameters(TinkerBody):
    """How tokens are chosen. stop: texts or tokens; null: the end token; an empty list: only the length ends a sample."""

    max_tokens: Annotated[int, Field(ge=0)] | None = None
    seed: int | None = None
    stop: str | Annotated[list[str] | list[int], Field(max_length=STOPS.most)] | None = None
    temperature: Annotated[_Real, Field(ge=0)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = -1
    top_p: Annotated[_Real, Field(gt=0, le=1)] = 1.0


class Sample(TinkerBody):
    """Samples of a prompt, and log-probabilities of its tokens."""

    prompt: ModelInput
    sampling_params: SamplingParameters
    num_samples: Annotated[int, Field(ge=1, le=MOST_SAMPLES)] = 1
    sampling_session_id: Text | None = None
    seq_id: Number | None = None
    base_model: Text | None = None
    model_path: Text | None = None
    prompt_logprobs: bool | None = None
    prompt_logprobs_last_n: Annotated[int, Field(ge=1)] | None = None
    topk_prompt_logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELIEST)] = 0
    topk_sample_logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELIEST)] = 0


class RequestId(TinkerBody):
    """The id of a request whose result is wanted."""

    request_id: Text
    allow_metadata_only: bool = False


class WeightsAddress(TinkerBody):
    """Saved weights."""

    tinker_path: Text


class Expiry(TinkerBody):
    """When saved weights expire; none: never."""

    ttl_seconds: Annotated[int, Field(gt=0)] | None = None


def described_checkpoint(saved: SavedWeights) -> dict[str, Any]:
    """Saved weights, as lists of them show."""
    return {
        "checkpoint_id": saved.address.checkpoint_id,
        "checkpoint_type": "training" if saved.address.kind == "weights" else "sampler",
        "time": iso_time(saved.time),
        "tinker_path": str(saved.address),
        "size_bytes": saved.size,
        "user_metadata": dict(saved.user_metadata) or None,
        "expires_at": None if saved.expires is None else iso_time(saved.expires),
    }


def described_run(record: RunRecord, checkpoints: Sequence[SavedWeights]) -> dict[str, Any]:
    """A training run, as lists of them show. checkpoints: its own, the newest first."""

    def newest(kind: str) -> dict[str, Any] | None:
        return next((described_checkpoint(each) for each in checkpoints if each.address.kind == kind), None)

    return {
        "training_run_id": record.id,
        "base_model": record.base_model,
        "model_owner": record.owner or "anybody",
        "is_lora": True,
        "lora_rank": record.lora.rank,
        "last_request_time": iso_time(record.used),
        "last_checkpoint": newest("weights"),
        "last_sampler_checkpoint": newest("sampler_weights"),
        "user_metadata": texts_of(record.user_metadata) or None,
    }


def described_lora(saved: SavedWeights) -> dict[str, Any]:
    """What a client needs to know of saved weights before it loads them."""
    return {
        "base_model": saved.base_model,
        "optimizer_config": {"type": "adamw"},
        "is_lora": True,
        "lora_rank": saved.lora.rank,
        "train_unembed": False,
        "train_mlp": saved.lora.train_mlp,
        "train_attn": saved.lora.train_attn,
    }


def texts_of(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Metadata in the form that clients read: texts."""
    return {name: value if isinstance(value, str) else str(value) for name, value in metadata.items()}
