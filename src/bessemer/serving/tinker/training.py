"""Training runs of clients: adapters of one base model, each with its gradients, its optimizer and its own trainer.

Every run has modules of its own over the base's tensors, which are never copied and never change, and low-rank updates beside
the linear layers. `forward_backward` adds the gradients of a loss; `optim_step` updates and drops them. A run is used by one
thread at a time.

Shapes: T tokens of an example, K targets of a token.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import AdamW

from bessemer.core.errors import ConfigError, RequestError
from bessemer.distributed.collectives import clip_gradients
from bessemer.distributed.sharding import product_matrices
from bessemer.model.adapters import Adapter
from bessemer.model.adapters.trained import adapter_of, add_adapters, initial_tensors, is_of_adapter
from bessemer.model.decoder import Decoder
from bessemer.model.device import check_dtype, choose_device
from bessemer.model.storage.folder import load_model
from bessemer.serving.tinker.config import LARGEST_RANK, TrainingSettings
from bessemer.serving.tinker.losses import NamedObjective, batch_of, check_data, checked_config, find_loss
from bessemer.serving.tinker.wire import Datum
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer
from bessemer.training.config_parts import ComputeSettings
from bessemer.training.data.batch import Batch
from bessemer.training.model_setup import recompute_activations
from bessemer.training.optim.optimizers import step_optimizers
from bessemer.training.runtime import Runtime
from bessemer.training.trainer import Trainer

#: α of every adapter: updates are scaled by α / rank (Schulman et al. 2025, "LoRA without regret").
ALPHA = 32.0
#: Setting of a run → part of the names of the layers that it trains.
_PARTS = {"train_attn": "self_attn", "train_mlp": "mlp"}


@dataclass(frozen=True)
class LoraSettings:
    """The adapter of a run, as the client asks for it. seed: of its first numbers."""

    rank: int
    seed: int
    train_attn: bool = True
    train_mlp: bool = True

    def check(self) -> None:
        """Raises RequestError for an adapter that cannot be trained here."""
        if not 1 <= self.rank <= LARGEST_RANK:
            raise RequestError(f"lora_config.rank: {self.rank}; between 1 and {LARGEST_RANK:,}")
        if not (self.train_attn or self.train_mlp):
            raise RequestError(
                "lora_config: this server trains attention and feed-forward layers, and not the unembedding; set train_attn "
                "or train_mlp"
            )


@dataclass(frozen=True)
class AdamSettings:
    """AdamW's numbers for one step. grad_clip_norm: the largest norm of all gradients together; 0: any."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True)
class LossResult:
    """A loss, a sum over all examples, in nats times weights; and log p of each example's targets, (T,) or (T, K) float32."""

    loss: float
    log_probs: Sequence[np.ndarray]
    tokens: int


class BaseModel:
    """The model that all runs share: a folder's weights, frozen."""

    def __init__(self, folder: Path, settings: TrainingSettings | None = None) -> None:
        """Raises ArtefactError for a damaged folder, ConfigError for a device or a dtype that this machine does not have."""
        self.settings = settings or TrainingSettings()
        device = choose_device(self.settings.device)
        check_dtype(self.settings.dtype, device)
        self.folder = folder
        self.tokenizer: Tokenizer = load_tokenizer(folder)
        self.model = load_model(folder, device=device, dtype=torch.float32).eval()
        self.model.requires_grad_(False)
        self.runtime = Runtime.of(ComputeSettings(dtype=self.settings.dtype, compile=False), device)
        dtype = getattr(torch, self.settings.dtype)
        for matrix in product_matrices(self.model):
            # with float32 matrices autocast would make a copy in every product, kept for the backward pass
            matrix.data = matrix.data.to(dtype)

    @property
    def context_length(self) -> int:
        return self.model.config.max_position_embeddings

    def shared(self) -> Decoder:
        """A decoder with modules of its own over the base's tensors."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return copy.deepcopy(self.model, {id(tensor): tensor for tensor in tensors})

    def served(self) -> Decoder:
        """The model for an engine: the same tensors; those that are not in the matrices' dtype are converted."""
        model = self.shared()
        if self.settings.dtype != "float32":
            for module in model.modules():
                # a parameter's data is shared with the base, so it is replaced and not converted in place
                for name, parameter in module._parameters.items():
                    if parameter is not None and parameter.is_floating_point():
                        converted = parameter.data.to(getattr(torch, self.settings.dtype))
                        module._parameters[name] = torch.nn.Parameter(converted, requires_grad=False)
        return model


class TrainingRun:
    """An adapter in training, on a base that it shares with others."""

    def __init__(self, base: BaseModel, lora: LoraSettings) -> None:
        """Raises RequestError as `LoraSettings.check`, and for a base without such layers."""
        lora.check()
        self.lora = lora
        self._base = base
        self.model = base.shared()
        patterns = [f"*.{part}.*" for name, part in _PARTS.items() if getattr(lora, name)]
        try:
            add_adapters(self.model, rank=lora.rank, scale=ALPHA / lora.rank, patterns=patterns)
        except ConfigError as error:
            raise RequestError(f"lora_config: {error}") from None
        self._parameters = {name: each for name, each in self.model.named_parameters() if is_of_adapter(name)}
        self._take(initial_tensors(self.model, lora.seed))
        if base.settings.recompute:
            recompute_activations(self.model, "full")
        self.model.train()
        self._optimizer = AdamW(self._parameters.values(), fused=True)
        self._objective = NamedObjective(find_loss("cross_entropy"), {})
        self._trainer = Trainer(self.model, [self._optimizer], self._objective, base.runtime, gradient_clip=math.inf)
        #: Optimizer steps so far.
        self.steps = 0

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The adapter's parameters by name; their gradients are those since the last step."""
        return self._parameters

    def forward(self, data: Sequence[Datum], loss: str, config: Mapping[str, float | str] | None = None) -> LossResult:
        """A loss without gradients. Raises RequestError where it cannot be computed from the data."""
        return self._computed(data, loss, config or {}, with_gradients=False)

    def forward_backward(self, data: Sequence[Datum], loss: str, config: Mapping[str, float | str] | None = None) -> LossResult:
        """A loss; its gradients are added to those since the last step. Raises RequestError as `forward`, and then changes
        nothing."""
        return self._computed(data, loss, config or {}, with_gradients=True)

    def optim_step(self, adam: AdamSettings) -> float:
        """Update the adapter by the gradients since the last step, and drop them; returns their norm before clipping.

        Raises RequestError where there are none, and where they are not finite: then they are dropped and the adapter stays.
        """
        gradients = [each.grad for each in self._parameters.values() if each.grad is not None]
        if not gradients:
            raise RequestError("optim_step: there are no gradients since the last step; call forward_backward before")
        for group in self._optimizer.param_groups:
            group |= {"lr": adam.learning_rate, "betas": (adam.beta1, adam.beta2), "eps": adam.eps}
            group["weight_decay"] = adam.weight_decay
        largest = adam.grad_clip_norm if adam.grad_clip_norm > 0 else math.inf
        norm = float(clip_gradients(self._parameters.values(), largest, self._trainer.mesh))  # type: ignore[arg-type]
        if not math.isfinite(norm):
            self._optimizer.zero_grad(set_to_none=True)
            raise RequestError(f"optim_step: the norm of the gradients is {norm}; they are dropped, and nothing is changed")
        step_optimizers([self._optimizer])
        self.steps += 1
        return norm

    def adapter(self) -> Adapter:
        """The adapter as an engine takes it; its tensors are those in training."""
        return adapter_of(self.model)

    def state(self) -> dict[str, Tensor]:
        """The adapter and AdamW's averages, by name: everything that later steps depend on except gradients."""
        tensors = {name: parameter.detach().cpu() for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            for part, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"{part}/{name}"] = value.detach().cpu()
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor], *, steps: int, with_optimizer: bool) -> None:
        """Restore what `state` returned. with_optimizer: AdamW's averages too; else they start from 0. Gradients are dropped.

        Raises RequestError for the state of another adapter, and then changes nothing.
        """
        wanted = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        given = {name: tuple(tensor.shape) for name, tensor in tensors.items() if "/" not in name}
        if wanted != given:
            raise RequestError("load_state: the state is of an adapter with other layers, another rank or another base model")
        self._take(tensors)
        self._optimizer.state.clear()
        self._optimizer.zero_grad(set_to_none=True)
        self.steps = steps if with_optimizer else 0
        for name, parameter in self._parameters.items() if with_optimizer else ():
            parts: dict[str, Any] = {
                key.partition("/")[0]: tensor.to(parameter.device)
                for key, tensor in tensors.items()
                if key.endswith(f"/{name}")
            }
            if parts:
                self._optimizer.state[parameter] = parts

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[name])

    def _computed(
        self, data: Sequence[Datum], loss: str, config: Mapping[str, float | str], *, with_gradients: bool
    ) -> LossResult:
        numbers = checked_config(loss, config)
        check_data(loss, data, vocabulary=self.model.config.vocab_size, longest=self._base.context_length)
        # make all batches before computing the first: an error must not change gradients
        batches = [(places, batch_of([data[place] for place in places])) for places in self._micro_batches(data)]
        log_probs: list[np.ndarray] = [np.zeros(0, np.float32)] * len(data)
        total = 0.0
        for places, batch in batches:
            objective = self._trainer.objective = NamedObjective(find_loss(loss), numbers)
            total += self._totals(batch, with_gradients=with_gradients)
            (values,) = objective.log_probs
            for row, place in zip(values.float().cpu().numpy(), places, strict=True):
                shape = data[place].inputs["target_tokens"].shape
                log_probs[place] = row[tuple(slice(size) for size in shape)] if row.ndim == len(shape) else row[: shape[0], 0]
        return LossResult(total, log_probs, sum(len(datum.tokens_T) for datum in data))

    def _totals(self, batch: Batch, *, with_gradients: bool) -> float:
        if with_gradients:
            return self._trainer.gradients(batch).loss
        return self._trainer.evaluate([batch]).loss

    def _micro_batches(self, data: Sequence[Datum]) -> Iterator[list[int]]:
        """Indices of the examples of each micro-batch: examples of similar lengths, so that padding is short."""
        by_length = sorted(range(len(data)), key=lambda place: -len(data[place].tokens_T))
        start = 0
        while start < len(by_length):
            rows = max(1, self._base.settings.micro_batch_tokens // len(data[by_length[start]].tokens_T))
            yield by_length[start : start + rows]
            start += rows
