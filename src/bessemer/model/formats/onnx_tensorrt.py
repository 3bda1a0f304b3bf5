"""TensorRT: an engine for an NVIDIA card, built from the ONNX file and timed. It has not been run by its authors."""

from __future__ import annotations

import math
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bessemer.core.errors import ArtefactError, ConfigError, writing_to
from bessemer.model.config import ModelConfig
from bessemer.model.folder import load_model
from bessemer.model.formats.onnx import cache_names, check_form, require, write_onnx
from bessemer.model.quantisation.quantised_modules import dequantised

#: What the engine is tuned for and timed with: rows, tokens read at once, tokens in the cache.
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
        # what the engine reads and writes, kept alive
        held = []
        for name, shape in _shapes(config, new, before).items():
            dtype = torch.float16 if name.startswith("past") else torch.int64
            # an empty tensor has no address, and TensorRT wants one
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
