"""The sampler of a policy in training: the engine completes prompts with the current weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from bessemer.core.errors import ConfigError
from bessemer.core.hashing import derive_seed
from bessemer.inference.collective import CollectiveEngine, copy_trained, serving_copy
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.inference.execution.compiled_steps import CompiledSteps
from bessemer.inference.execution.steps.plain import MOST_TOKENS
from bessemer.model.adapters.trained import adapter_of, adapters_of, merged, merged_in_place, without_adapters
from bessemer.model.cpu_kernels import library
from bessemer.model.decoder import Decoder
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.quantise import quantise
from bessemer.model.quantisation.quantised_decoder import quantisable, weight_name
from bessemer.model.quantisation.quantised_layers import is_quantised
from bessemer.model.vision.trained import VisionDecoder
from bessemer.posttraining.sampling.samples import Prompt, Sample, Share
from bessemer.posttraining.sampling.served_policy import ServedPolicy
from bessemer.posttraining.sampling.server_pool import ServerPool
from bessemer.tokenization.tokenizer import Tokenizer
from bessemer.training.adapter_config import KERNELS_OVER_CODES
from bessemer.training.model_roles import POLICY, ModelRoles

#: Most sequences of the engine at once, and the smallest limit on the tokens of a step.
_MOST_SEQUENCES, _LEAST_BATCHED_TOKENS = 256, 512

SamplingEngine = Engine | CollectiveEngine | ServerPool

#: Form of the policy's weights while it samples.
SamplerWeights = Literal["policy", "int8", "int4", "fp8"]

#: Where the engine samples from a copy of weights that are wider than the trainer's products.
_COPYING_DEVICES = ("cuda",)

#: The engine's name for the adapter in training.
_ADAPTER = "policy"

#: A prompt and its tokens.
EncodedPrompt = tuple[Prompt, list[int]]


@dataclass(frozen=True)
class SamplerSettings:
    """Settings of completions. context_length: most tokens of a prompt and its completion. sequences: most completions at once.
    stop: texts at which a completion ends; None: those of its prompt. cpu_kernels: as in EngineConfig. sleeps: whether the
    engine frees its cache's memory between two uses. weights: the policy's own, or the form to which they are rounded before
    each use."""

    temperature: float
    max_tokens: int
    context_length: int
    sequences: int
    stop: Sequence[str] | None = None
    cpu_kernels: Literal["auto", "on", "off"] = "auto"
    sleeps: bool = False
    weights: SamplerWeights = "policy"


class Sampler:
    """Completes prompts with the policy's current weights.

    An adapter in training is merged into the weights while compiled kernels sample, since they pack the weights in any case.
    Otherwise the engine applies it as an adapter, and in one process the weights are not copied. Servers get a copy of either.
    """

    def __init__(self, tokenizer: Tokenizer, settings: SamplerSettings, seed: int, servers: ServedPolicy | None = None) -> None:
        """servers: sample in place of an engine of this process; of several processes only the first calls them."""
        self.servers = servers
        self.tokenizer = tokenizer
        self._settings = settings
        self.seed = seed
        self._models: ModelRoles | None = None
        self._engine: Engine | CollectiveEngine | None = None
        #: The policy in the dtype of the trainer's products, which the engine then has; None: it has the policy.
        self._copy: Decoder | None = None
        #: Name of the policy's adapter in the engine; None: merged, or there is none.
        self.adapter: str | None = None

    def bind(self, models: ModelRoles) -> None:
        """Sample with the policy of these models from now on."""
        if models is not self._models:
            self._models, self._engine, self._copy, self.adapter = models, None, None, None

    @property
    def models(self) -> ModelRoles:
        assert self._models is not None, "the training loop binds its models before the first batch"
        return self._models

    @contextmanager
    def sampling(self) -> Iterator[SamplingEngine]:
        """The engine with the policy's current weights; on a mesh it spans all processes. Leaves the random state unchanged."""
        models = self.models
        if self.servers is not None:
            yield self.servers.with_weights_of(models)
            return
        with models.prepared(POLICY) as prepared, torch.random.fork_rng(), ExitStack() as entered:
            model = prepared.model
            if self._settings.weights != "policy":
                yield entered.enter_context(self._rounded_engine(model))
                return
            entered.enter_context(without_adapters(model))
            kernels = self._kernels(model)
            if adapters_of(model):
                # merging rounds weights, so a merged model differs from the trainer's
                merges = kernels == "on" and models.mesh.alone and not model.is_batch_invariant
                # an engine shows pictures to no adapter
                merges |= isinstance(model, VisionDecoder)
                self.adapter = None if merges else _ADAPTER
                if merges and models.mesh.alone:
                    entered.enter_context(merged_in_place(model))
            if self._engine is None:
                self._engine = self._new_engine(model, kernels)
            elif self._settings.sleeps:
                self._engine.wake()
            if self._copy is not None and self.adapter is None:
                copy_trained(model, self._copy)
            if self.adapter is None and isinstance(self._engine, CollectiveEngine):
                # shards of weights are merged with a whole adapter in the engine's copy
                beside = models.adapter() if adapters_of(model) else None
                self._engine.update_weights(version=models.version, adapter=beside)
            elif self.adapter is None:
                self._engine.update_weights(version=models.version)
            else:
                self._engine.update_adapter(self.adapter, models.adapter(), version=models.version)
            yield self._engine
            if self._settings.sleeps:
                self._engine.sleep()

    def _rounded_engine(self, model: Decoder) -> Engine:
        """An engine of a copy of the policy with its adapter merged and its weights rounded. Raises ConfigError."""
        settings = self._settings
        if not self.models.mesh.alone:
            raise ConfigError(f"sampler_weights: {settings.weights}: weights are rounded in one process; take policy")
        if is_quantised(model):
            raise ConfigError(f"sampler_weights: {settings.weights}: the policy's weights are codes already; take policy")
        if isinstance(model, VisionDecoder):
            raise ConfigError(f"sampler_weights: {settings.weights}: the policy reads pictures by whole weights; take policy")
        rounded = rounded_copy(model, settings.weights)
        kernels: Literal["on", "off"] = "off" if settings.cpu_kernels == "off" or library() is None else "on"
        engine = Engine(
            rounded, self.tokenizer, config=self._engine_config(rounded, kernels).with_changes(kv_cache_dtype="auto")
        )
        engine.update_weights(version=self.models.version)
        return engine

    def _serving_dtype(self, model: Decoder) -> torch.dtype | None:
        """The dtype of a copy of the policy that samples: on a GPU that of the trainer's products, since its weights are
        float32 and the engine has no autocast. None: the policy's own weights sample."""
        runtime = self.models.runtime
        is_wide = model.dtype == torch.float32 and not is_quantised(model) and not model.is_batch_invariant
        serves = is_wide and runtime.dtype != "float32" and torch.device(runtime.device).type in _COPYING_DEVICES
        return getattr(torch, runtime.dtype) if serves else None

    def _engine_config(self, model: Decoder, kernels: Literal["auto", "on", "off"]) -> EngineConfig:
        models, settings = self.models, self._settings
        sequences = min(max(settings.sequences, 1), _MOST_SEQUENCES)
        # the tokens of a picture that see each other are computed in one step
        whole = model.vision_config.tokens_per_tile if isinstance(model, VisionDecoder) else 0
        return EngineConfig(
            max_model_len=min(settings.context_length, model.config.max_position_embeddings),
            max_num_seqs=sequences,
            max_num_batched_tokens=max(_LEAST_BATCHED_TOKENS, MOST_TOKENS * sequences, whole + sequences),
            cpu_kernels=kernels,
            # with quantised weights the engine's cache would be in half precision, unlike the trainer
            kv_cache_dtype="float32" if is_quantised(model) and models.runtime.dtype == "float32" else "auto",
            threads=models.runtime.threads,
        )

    def _new_engine(self, model: Decoder, kernels: Literal["auto", "on", "off"]) -> Engine | CollectiveEngine:
        models, config, dtype = self.models, self._engine_config(model, kernels), self._serving_dtype(model)
        engine: Engine | CollectiveEngine
        if not models.mesh.alone:
            engine = CollectiveEngine(model, self.tokenizer, models.mesh, config, dtype=dtype)
        elif dtype is None:
            engine = Engine(model, self.tokenizer, config=config)
        else:
            self._copy = serving_copy(model, models.mesh, dtype)
            copy_trained(model, self._copy)
            engine = Engine(self._copy, self.tokenizer, config=config)
        if self.adapter is not None:
            engine.load_adapter(self.adapter, models.adapter())
        return engine

    def _kernels(self, model: Decoder) -> Literal["auto", "on", "off"]:
        """The setting, with `auto` decided in one process: compiled kernels where they compute the whole model in the trainer's
        type. Packing the weights at each rollout takes less time than they save in a few tokens.

        Raises ConfigError for kernels over quantised weights: they round activations to 8 bits, and the trainer does not.
        """
        setting = self._settings.cpu_kernels
        if model.is_batch_invariant:
            return "on"
        if is_quantised(model):
            if setting == "on":
                raise ConfigError(KERNELS_OVER_CODES)
            return "off"
        if (
            setting != "auto"
            or not self.models.mesh.alone
            or self.models.runtime.dtype != "float32"
            or CompiledSteps.supports(model) is not None
        ):
            return setting
        return "on"

    def completions(
        self,
        engine: SamplingEngine,
        prompts: Sequence[EncodedPrompt],
        number: int,
        *,
        seeds: tuple[str | int, ...] = (),
        places: Sequence[int] | None = None,
        greedy: bool = False,
    ) -> list[Sample]:
        """`number` completions of each prompt; those of a prompt are neighbours. seeds: what the random numbers depend on,
        besides each prompt's place. places: the prompts' places among all, where these are only some.
        """
        if not prompts:
            # ranks without a prompt must still take part in the collectives
            engine.rollouts([], number, [], adapter=self.adapter)
            return []
        settings = self._settings
        params = [
            SamplingParams(
                temperature=0.0 if greedy else settings.temperature,
                max_tokens=settings.max_tokens,
                stop=list(prompt.stop if settings.stop is None else settings.stop),
                seed=derive_seed(self.seed, *seeds, place),
            )
            for place, (prompt, _) in zip(range(len(prompts)) if places is None else places, prompts, strict=True)
        ]
        rollouts = engine.rollouts([prompt.request(ids) for prompt, ids in prompts], number, params, adapter=self.adapter)
        samples = []
        for row in range(len(prompts) * number):
            first, end = int(rollouts.prompt_lengths[row]), int(rollouts.lengths[row])
            samples.append(
                Sample(
                    prompts[row // number][0],
                    rollouts.tokens[row, :end].tolist(),
                    first,
                    rollouts.log_probs[row, first:end].tolist(),
                    rollouts.texts[row],
                    rollouts.finish_reasons[row] == "length",
                    versions=rollouts.weight_version[row, first:end].tolist(),
                )
            )
        return samples

    def all_completions(
        self,
        engine: SamplingEngine,
        prompts: Sequence[EncodedPrompt],
        number: int,
        *,
        seeds: tuple[str | int, ...] = (),
    ) -> list[Sample]:
        """`completions` of all prompts, on every process: on a mesh each group of ranks samples its share of the prompts. Every
        process calls this with the same prompts. Up to rounding, the completions do not depend on the number of processes.
        """
        share = Share(self.models.mesh)
        places = range(len(prompts))[share.places]
        samples = self.completions(engine, prompts[share.places], number, seeds=seeds, places=places)
        groups = share.gathered(lambda: [samples[start : start + number] for start in range(0, len(samples), number)])
        return [sample for group in groups for sample in group]


#: Largest number of float8 e4m3.
_LARGEST_FLOAT8 = 448.0


@torch.no_grad()
def rounded_copy(model: Decoder, weights: SamplerWeights) -> Decoder:
    """A new decoder with the model's weights, its adapter in training merged, and the blocks' matrices rounded: to 8-bit codes
    with a scale for each output, to 4-bit codes with a scale for each group, or to float8 (e4m3, 3 bits of mantissa) with a
    scale for each output. Compiled kernels multiply codes by activations of 8 bits; float8 weights are multiplied in
    float32."""
    copy = merged(model, adapter_of(model))
    if weights != "fp8":
        quantise(copy, QuantizeConfig(scheme=weights))
        return copy
    for name, _ in quantisable(copy):
        # the copy shares the policy's tensors: replace them, do not change them
        weight = copy.get_parameter(weight_name(name))
        weight_NK = weight.data
        scale_N1 = weight_NK.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST_FLOAT8
        weight.data = (weight_NK / scale_N1).to(torch.float8_e4m3fn).to(weight_NK.dtype) * scale_N1
    return copy
