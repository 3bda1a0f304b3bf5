"""ONNX: the decoder as a graph that ONNX Runtime and others run, and a TensorRT engine built from it.

Inputs and outputs have the names that `optimum` gives them: `input_ids`, `attention_mask`, `position_ids` and
`past_key_values.N.key` / `.value` go in, `logits` and `present.N.key` / `.value` come out; batch, sequence and past are free. A
cache is a value here and not an object: what comes out of one call is given to the next.

The TensorRT engine is for an NVIDIA GPU and is timed. It has not been run by its authors.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from bessemer.core.environment import install_extra
from bessemer.core.errors import ArtefactError, ConfigError, writing_to
from bessemer.core.store import new_folder
from bessemer.model.attention import LayerType
from bessemer.model.attention.base import variants_in
from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.model.layers.attention_mask import AttentionMask, alibi_slopes
from bessemer.model.layers.cache import AttentionInputs, Cache
from bessemer.model.layers.feed_forward import Experts, Routing
from bessemer.model.layers.positions import Rotation
from bessemer.model.quantisation.quantised_decoder import dequantised
from bessemer.model.storage.folder import load_model
from bessemer.model.storage.model_config import CONFIG, TOKENIZER_FILES, read_model_config

if TYPE_CHECKING:
    from types import ModuleType


# Shapes: B batch, T new tokens, P past tokens, S = P + T, K key-value heads, C channels of a head, N tokens of a batch,
# E experts, k experts of a token, D hidden.
OPSET = 20
#: Bytes of weights above which they are stored in FILE.data: a file of ONNX holds at most 2 GiB.
_EXTERNAL_ABOVE = 1_500_000_000


def why_not(config: ModelConfig) -> str | None:
    """What of a model cannot be written as ONNX, in words; None when all can."""
    for variant in variants_in(config):
        if variant.not_in_onnx is not None:
            return variant.not_in_onnx
    if config.rope_scaling.rope_type == "dynamic":
        return "dynamic rotary scaling: its frequencies follow the length of the text, and a graph's are fixed"
    return None


def export_onnx(folder: Path, out: Path) -> list[str]:
    """Write the model of a folder as ONNX in float32. Returns notes for the user.

    out: a file that ends in .onnx, or a folder that is not there yet, which then also gets the config and the tokenizer, as
    `optimum` opens it. Raises ConfigError when the packages are missing, ArtefactError when the folder holds no model or
    one that has no such form.
    """
    check_form(folder)
    for package in ("onnx", "onnxscript"):
        require(package, f"--format onnx needs the package {package}: {install_extra('onnx')}")
    if out.suffix == ".onnx":
        if out.is_dir():
            raise ArtefactError(f"{out}: is a folder; name the file to write")
        return write_onnx(dequantised(load_model(folder, dtype=torch.float32)), out)
    with new_folder(out) as partial:
        notes = write_onnx(dequantised(load_model(folder, dtype=torch.float32)), partial / "model.onnx")
        for name in (CONFIG, *TOKENIZER_FILES):
            if (folder / name).exists():
                shutil.copyfile(folder / name, partial / name)
    return notes


def check_form(folder: Path) -> ModelConfig:
    """The config of a model that can be written as ONNX. Raises ArtefactError for another, with the reason."""
    config = read_model_config(folder)
    reason = why_not(config)
    if reason is not None:
        raise ArtefactError(f"{folder}: ONNX cannot hold {reason}")
    return config


def write_onnx(model: Decoder, path: Path) -> list[str]:
    """Write a decoder as an ONNX file, in the type that it has; large weights lie beside it in `FILE.data`.

    Multi-token prediction is left out. Returns notes for the user.
    """
    assert why_not(model.config) is None
    path.parent.mkdir(parents=True, exist_ok=True)
    graph, (inputs, free) = OnnxDecoder(model).eval(), _example(model)
    external = sum(tensor.nbytes for tensor in model.parameters()) > _EXTERNAL_ABOVE
    with (
        torch.no_grad(),
        _quiet(),
        graph.in_place(),
        writing_to(path),
        TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".partial") as scratch,
    ):
        program = torch.onnx.export(
            graph,
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=["logits", *cache_names("present", model.config)],
            dynamic_shapes=free,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.save(str(Path(scratch) / path.name), external_data=external)
        # the graph last, when its data are there
        for written in sorted(Path(scratch).iterdir(), key=lambda file: file.name == path.name):
            written.replace(path.parent / written.name)
    notes = []
    if model.config.num_nextn_predict_layers:
        notes.append("multi-token prediction is left out: ONNX files hold the next token's prediction only")
    if model.config.num_experts:
        chosen = f"{model.config.num_experts_per_tok} of {model.config.num_experts}"
        notes.append(f"every token goes through all experts, and only the {chosen} that it chose count: exact, and slower")
    return notes


def require(package: str, otherwise: str) -> ModuleType:
    """An optional package. Raises ConfigError with these words when it is not installed."""
    try:
        return import_module(package)
    except ImportError:
        raise ConfigError(otherwise) from None


def cache_names(prefix: str, config: ModelConfig) -> list[str]:
    """Names of every layer's keys and values, `past_key_values` or `present` first."""
    return [f"{prefix}.{layer}.{part}" for layer in range(config.num_hidden_layers) for part in ("key", "value")]


def _example(model: Decoder) -> tuple[dict[str, Tensor], tuple[Any, ...]]:
    """Inputs to trace with, no length of them 0 or 1, which tracing takes for fixed; and which axes are free."""
    config, batch, new, past = model.config, 2, 3, 4
    dtype, device = model.head_weight.dtype, model.head_weight.device
    shape = (batch, config.num_key_value_heads, past, config.head_dim)
    inputs: dict[str, Tensor] = {
        "input_ids": torch.zeros(batch, new, dtype=torch.int64, device=device),
        "attention_mask": torch.ones(batch, past + new, dtype=torch.int64, device=device),
        "position_ids": torch.arange(past, past + new, device=device).expand(batch, new).contiguous(),
    }
    names = cache_names("past_key_values", config)
    inputs |= {name: torch.zeros(shape, dtype=dtype, device=device) for name in names}
    rows, total = "batch_size", "past_sequence_length + sequence_length"
    of_new = {0: rows, 1: "sequence_length"}
    of_past = {0: rows, 2: "past_sequence_length"}
    dynamic = (of_new, {0: rows, 1: total}, of_new, tuple(of_past for _ in names))
    return inputs, dynamic


class OnnxDecoder(nn.Module):
    """The decoder as a function of tokens, mask, positions and past keys and values."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While the graph is taken: attention step by step, and experts without choices that depend on the numbers."""
        before = self.decoder.attention_backend
        experts = [module for module in self.modules() if isinstance(module, Experts)]
        self.decoder.set_attention_backend("explicit")
        for module in experts:
            module.forward = lambda hidden_ND, routing, experts=module: all_experts(experts, hidden_ND, routing)  # type: ignore[method-assign,misc]
        try:
            yield
        finally:
            self.decoder.set_attention_backend(before)
            for module in experts:
                del module.forward

    def forward(self, tokens_BT: Tensor, mask_BS: Tensor, positions_BT: Tensor, *past_BKPC: Tensor) -> tuple[Tensor, ...]:
        """Logits (B, T, V), and every layer's keys and values, (B, K, S, C) each.

        mask_BS: 1 for a token, 0 for padding, which may lie on the left. positions_BT: of the new tokens.
        """
        decoder, config = self.decoder, self.decoder.config
        cache = GrowingCache(past_BKPC)
        hidden_BTD = decoder._embedded(tokens_BT, positions_BT)
        kinds: dict[LayerType, tuple[AttentionMask, Rotation | None]] = {
            kind: (
                self._mask(kind, mask_BS, tokens_BT.shape[1], hidden_BTD.dtype),
                self._turned(kind, positions_BT, hidden_BTD),
            )
            for kind in dict.fromkeys(config.types)
        }
        for layer, block in enumerate(decoder.blocks):
            mask, rotation = kinds[config.types[layer]]
            turned = rotation if config.has_rope(layer) else None
            hidden_BTD = block.forward(hidden_BTD, turned, mask, cast(Cache, cache))
        return decoder.logits(decoder.norm(hidden_BTD)), *cache.present

    def _mask(self, kind: LayerType, mask_BS: Tensor, new: int, dtype: torch.dtype) -> AttentionMask:
        """The mask added to the scores. Padding sees itself, because a softmax over nothing is not a number."""
        config, seen_tokens = self.decoder.config, mask_BS.shape[1]
        keys_S = torch.arange(seen_tokens, device=mask_BS.device)
        queries_T = keys_S[seen_tokens - new :]
        distance_TS = queries_T[:, None] - keys_S
        allowed_TS = distance_TS >= 0
        if (window := config.window(kind)) is not None:
            allowed_TS = allowed_TS & (distance_TS < window)
        allowed_BTS = (allowed_TS & (mask_BS[:, None, :] != 0)) | (distance_TS == 0)
        penalty_BHTS = torch.zeros((), dtype=torch.float32, device=mask_BS.device)
        if config.position_type == "alibi":
            slopes_H = alibi_slopes(config.num_attention_heads).to(mask_BS.device)
            penalty_BHTS = -slopes_H[:, None, None] * distance_TS
        return AttentionMask(dense=torch.where(allowed_BTS[:, None], penalty_BHTS, -torch.inf).to(dtype))

    def _turned(self, kind: LayerType, positions_BT: Tensor, hidden_BTD: Tensor) -> Rotation | None:
        """Rotations computed from the positions: a table would be as long as the context and lie in the file."""
        if self.decoder.config.position_type != "rotary":
            return None
        local = kind == "sliding_attention" and hasattr(self.decoder, "rotary_local")
        rotary = self.decoder.rotary_local if local else self.decoder.rotary
        cosine, sine = rotary.turns(positions_BT.float())
        return Rotation(cosine[:, None].to(hidden_BTD.dtype), sine[:, None].to(hidden_BTD.dtype))


class GrowingCache:
    """What a block takes for a cache: earlier keys and values with the new ones behind them."""

    real_BT = None

    def __init__(self, past: tuple[Tensor, ...]) -> None:
        self.past = past
        self.present = list[Tensor]()

    def attend(self, layer: int, inputs: AttentionInputs) -> Tensor:
        """Attention over all keys and values of a layer, which are kept, (B, H, T, C)."""
        keys_BKSC = torch.cat((self.past[2 * layer], inputs.key_BKTC), dim=2)
        values_BKSC = torch.cat((self.past[2 * layer + 1], inputs.value_BKTV), dim=2)
        self.present += (keys_BKSC, values_BKSC)
        return inputs.backend(inputs.query_BHTC, keys_BKSC, values_BKSC, inputs.mask, inputs.scores)


def all_experts(experts: Experts, hidden_ND: Tensor, routing: Routing) -> Tensor:
    """What `experts` gives, by sending every token through every expert: weights of those it did not choose are 0."""
    count = experts.gate_up_proj.shape[0]
    weights_NE = torch.zeros_like(hidden_ND[:, :1]).expand(-1, count).scatter(1, routing.experts_Nk, routing.weights_Nk)
    # of weights that multiply inputs those of other experts still leave out what their biases give
    into_END = hidden_ND * weights_NE.T[..., None] if experts.weighs_inputs else hidden_ND
    weights_NE = (weights_NE > 0).to(hidden_ND.dtype) if experts.weighs_inputs else weights_NE
    inner_ENI = into_END @ experts.gate_up_proj.transpose(1, 2)
    if experts.gate_up_bias is not None:
        inner_ENI = inner_ENI + experts.gate_up_bias[:, None]
    out_END = experts.gate(inner_ENI) @ experts.down_proj.transpose(1, 2)
    if experts.down_bias is not None:
        out_END = out_END + experts.down_bias[:, None]
    return (out_END * weights_NE.T[..., None]).sum(0)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's warnings are about itself."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


#: Sizes that the engine is tuned and timed for: rows, tokens of a prompt, cached tokens.
_ROWS, _PROMPT, _PAST = 1, 512, 512
_TIMED_STEPS = 30


def export_tensorrt(folder: Path, out: Path) -> list[str]:
    """Build an engine from a model's folder and write it to `out`, a file. Returns notes: how fast a prompt and a step ran.

    Raises ConfigError where there is no NVIDIA card or no `tensorrt`; ArtefactError for a model that ONNX cannot hold, and
    when TensorRT refuses the graph, with what it said.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "--format tensorrt: builds and times an engine on the card that runs it, and there is no NVIDIA card here"
        )
    config = check_form(folder)
    trt: Any = require("tensorrt", "--format tensorrt needs NVIDIA's package: pip install tensorrt")
    out.parent.mkdir(parents=True, exist_ok=True)
    with writing_to(out), TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", suffix=".partial") as scratch:
        graph = Path(scratch) / "model.onnx"
        notes = write_onnx(dequantised(load_model(folder, dtype=torch.float16)), graph)
        engine = Path(scratch) / out.name
        engine.write_bytes(_build(trt, graph, config))
        notes += _timed(trt, engine.read_bytes(), config)
        engine.replace(out)
    return notes


def _build(trt: Any, graph: Path, config: ModelConfig) -> Any:
    """The engine, serialised. It follows the graph's own types, and takes any lengths up to the model's context."""
    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        said = "; ".join(str(parser.get_error(number)) for number in range(parser.num_errors))
        raise ArtefactError(f"--format tensorrt: TensorRT does not take the graph: {said}")
    longest = config.max_position_embeddings
    profile = builder.create_optimization_profile()
    shortest, usual = _shapes(config, 1, 0), _shapes(config, 1, min(_PAST, longest - 1))
    all_new, all_past = _shapes(config, longest, 0), _shapes(config, 1, longest - 1)
    for name in usual:
        profile.set_shape(name, shortest[name], usual[name], tuple(map(max, all_new[name], all_past[name])))
    settings = builder.create_builder_config()
    settings.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, settings)
    if engine is None:
        raise ArtefactError("--format tensorrt: TensorRT could not build an engine of the graph; its own messages stand above")
    return engine


def _shapes(config: ModelConfig, new: int, past: int) -> dict[str, tuple[int, ...]]:
    """The shape of every input for a number of new tokens after a number of cached ones."""
    cached = (_ROWS, config.num_key_value_heads, past, config.head_dim)
    return {
        "input_ids": (_ROWS, new),
        "attention_mask": (_ROWS, past + new),
        "position_ids": (_ROWS, new),
        **dict.fromkeys(cache_names("past_key_values", config), cached),
    }


def _timed(trt: Any, plan: bytes, config: ModelConfig) -> list[str]:
    """How long a prompt and one more token take on this card, in words."""
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(plan)
    context, stream = engine.create_execution_context(), torch.cuda.Stream()
    prompt, past = (min(length, config.max_position_embeddings // 2) for length in (_PROMPT, _PAST))
    lines = []
    for what, new, before in (("a prompt", prompt, 0), ("one token", 1, past)):
        # keeps the engine's buffers alive
        held = []
        for name, shape in _shapes(config, new, before).items():
            dtype = torch.float16 if name.startswith("past") else torch.int64
            # TensorRT wants an address, which an empty tensor has not
            held.append(torch.ones(shape if math.prod(shape) else (1,), dtype=dtype, device="cuda"))
            context.set_input_shape(name, shape)
            context.set_tensor_address(name, held[-1].data_ptr())
        for name in ("logits", *cache_names("present", config)):
            held.append(torch.empty(tuple(context.get_tensor_shape(name)), dtype=torch.float16, device="cuda"))
            context.set_tensor_address(name, held[-1].data_ptr())
        seconds = []
        for _ in range(_TIMED_STEPS):
            stream.synchronize()
            begin = time.perf_counter()
            context.execute_async_v3(stream.cuda_stream)
            stream.synchronize()
            seconds.append(time.perf_counter() - begin)
        after = f" after {before}" if before else ""
        rate = f"{new * _ROWS / median(seconds):,.0f} tokens/s"
        lines.append(f"{what} of {new} tokens{after}: {rate}" if new > 1 else f"{what}{after}: {rate}")
    return [f"{torch.cuda.get_device_name()}, float16: " + "; ".join(lines)]
