"""Tokens a second of the engine on a GPU: pages gathered, read where they lie, and with CUDA graphs; vLLM beside it.

    python benchmarks/engine_gpu.py                        # a Llama-like model of a billion parameters, random weights
    python benchmarks/engine_gpu.py --preset llama-3.2-1b  # or any preset's shape
    python benchmarks/engine_gpu.py --smoke                # the same code on any processor, with a toy model: no measurement

1, 8 and 64 streams, each with a prompt of its own and so many new tokens, greedily, prefix caches off. A way of computing runs
in a process of its own: once to compile, capture and warm up, then three times. Of these the best counts, and where they spread
over 30 % nothing is said. Weights are random, so no text ends early. vLLM reads the same model from a folder, and is left out
where it is not installed. The last line of each way is one JSON object; the default model's are kept in `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import recording

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/inference", "src/bessemer/model")

BILLION = {
    "vocab_size": 65536, "hidden_size": 2048, "num_hidden_layers": 20, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 128, "intermediate_size": 5632, "max_position_embeddings": 4096,
}  # fmt: skip
TOY = {
    "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 128, "max_position_embeddings": 64,
}  # fmt: skip
STREAMS, ROUNDS, LARGEST_SPREAD = (1, 8, 64), 3, 0.3
#: Tokens that the tokenizer's own form adds.
SPECIAL = 3

#: The engine's settings of each way; vLLM has none of ours.
WAYS: dict[str, dict[str, Any]] = {
    "gather": {"paged_attention": "gather"},
    "paged": {"paged_attention": "flex", "cuda_graphs": False},
    "paged+graphs": {"paged_attention": "flex"},
    "vllm": {},
}


def engine_of(preset: str | None, way: str, smoke: bool) -> Callable[[list[list[int]], int], None]:
    """A function that answers prompts of token ids with so many tokens each, with our engine."""
    import torch

    from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
    from bessemer.tokenization.bpe import byte_level_bpe
    from bessemer.tokenization.folder import write_folder
    from bessemer.tokenization.tokenizer import load_tokenizer

    model = random_model(preset, smoke)
    device = torch.device("cpu" if smoke else "cuda")
    memory = 0.01 if smoke else None
    config = EngineConfig(
        cpu_kernels="off",
        prefix_cache=False,
        max_num_seqs=STREAMS[-1],
        max_num_batched_tokens=2048,
        kv_memory=memory,
        **WAYS[way],
    )
    # of single bytes and pairs of them, as many as the model has: a model with random weights may make any
    single = [bytes([byte]) for byte in range(256)]
    pairs = [left + right for left in single for right in single]
    folder = Path(tempfile.mkdtemp()) / "tokenizer"
    write_folder(folder, byte_level_bpe((single + pairs)[: model.config.vocab_size - SPECIAL], split="qwen2"))
    engine = Engine(model.to(device), load_tokenizer(folder), config=config)
    print(f"  {engine.describe()}", file=sys.stderr)

    def answer(prompts: list[list[int]], tokens: int) -> None:
        made = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
        assert all(completion.completion_tokens == tokens for completion in made)

    return answer


def random_model(preset: str | None, smoke: bool) -> Any:
    """The model with random weights, in bfloat16, of the toy in float32."""
    import torch

    from bessemer.model.config import ModelConfig
    from bessemer.model.initialisation import initial_decoder
    from bessemer.model.presets import PRESETS

    config = (
        ModelConfig(**TOY)
        if smoke
        else ModelConfig(**BILLION if preset is None else PRESETS[preset] | {"vocab_size": BILLION["vocab_size"]})
    )
    return initial_decoder(config, seed=1).to(torch.float32 if smoke else torch.bfloat16).eval()


def vllm_of(preset: str | None, smoke: bool) -> Callable[[list[list[int]], int], None]:
    """The same with vLLM, which reads the model from a folder; its own CUDA graphs are on."""
    from vllm import LLM, SamplingParams

    from bessemer.model.storage.folder import save_model

    folder = Path(tempfile.mkdtemp()) / "model"
    save_model(random_model(preset, smoke), folder, tokenizer=None)
    peer = LLM(str(folder), skip_tokenizer_init=True, enable_prefix_caching=False, max_num_seqs=STREAMS[-1], seed=1)

    def answer(prompts: list[list[int]], tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        made = peer.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        assert all(len(one.outputs[0].token_ids) == tokens for one in made)

    return answer


def measure(preset: str | None, way: str, smoke: bool) -> dict[str, Any]:
    """New tokens a second by number of streams."""
    import torch

    answer = vllm_of(preset, smoke) if way == "vllm" else engine_of(preset, way, smoke)
    length, tokens = (12, 4) if smoke else (128, 256)
    vocab_size = (TOY if smoke else BILLION)["vocab_size"]
    rates, spreads = {}, {}
    for streams in STREAMS:
        generator = torch.Generator().manual_seed(streams)
        prompts = torch.randint(0, vocab_size, (streams, length), generator=generator).tolist()
        answer(prompts, tokens)
        seconds = []
        for _ in range(ROUNDS):
            begun = time.perf_counter()
            answer(prompts, tokens)
            seconds.append(time.perf_counter() - begun)
        rates[streams], spreads[streams] = streams * tokens / min(seconds), max(seconds) / min(seconds) - 1
    return {
        "name": f"engine_gpu_{way}",
        "device": "a processor" if smoke else torch.cuda.get_device_name(),
        "tokens_per_second": {streams: round(rate, 1) for streams, rate in rates.items()},
        "spread": {streams: round(spread, 3) for streams, spread in spreads.items()},
        "prompt_tokens": length,
        "new_tokens": tokens,
        "smoke": smoke,
    }


def obstacle(way: str, smoke: bool) -> str | None:
    """Why a way cannot be measured here, in one line; None when it can."""
    if way == "vllm" and importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed: pip install vllm"
    if way == "paged+graphs" and smoke:
        return "CUDA graphs need a GPU"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="Exercise the code on a processor, with a toy model.")
    parser.add_argument("--preset", help="A model's shape by its preset's name; else a billion parameters.")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.preset, arguments.measure, arguments.smoke)))
        return 0
    import torch

    if not arguments.smoke and not torch.cuda.is_available():
        recording.not_run("no CUDA device")
    measured: dict[str, dict[str, Any]] = {}
    for way in WAYS:
        reason = obstacle(way, arguments.smoke)
        if reason is not None:
            print(f"{way}: left out, {reason}")
            continue
        command = [sys.executable, "-W", "ignore", __file__, "--measure", way]
        command += ["--smoke"] if arguments.smoke else []
        command += ["--preset", arguments.preset] if arguments.preset else []
        done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8")
        if done.returncode:
            raise SystemExit(f"{way}: failed, see above")
        found = json.loads(done.stdout.splitlines()[-1])
        if not arguments.smoke and max(found["spread"].values()) > LARGEST_SPREAD:
            raise SystemExit(f"{way}: times spread by {max(found['spread'].values()):.0%}; other work disturbs this machine")
        note = " (a smoke test, no measurement)" if arguments.smoke else ""
        print(f"{way} on {found['device']}{note}, tokens/s:")
        for streams, rate in found["tokens_per_second"].items():
            print(f"  {streams:>2} streams {rate:>10,.1f}")
        print(json.dumps(found), flush=True)
        measured[way] = found
    if not arguments.smoke and not arguments.preset:
        columns = [(f"{streams} {'stream' if streams == 1 else 'streams'}", ",.0f") for streams in STREAMS]
        rows = [[way, *found["tokens_per_second"].values()] for way, found in measured.items()]
        table = recording.table([("tokens/s", ""), *columns], rows)
        peers = {"vllm": metadata.version("vllm")} if "vllm" in measured else {}
        note = f"On {torch.cuda.get_device_name()}."
        recording.save(
            "engine_gpu", {"ways": measured}, tables={"streams": table}, peers={"torch": torch.__version__, **peers}, note=note
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
