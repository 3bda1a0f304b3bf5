"""A trained model's folder read by somebody else: Qwen3's forward pass in plain JAX, from config.json and safetensors alone.

    python benchmarks/jax_forward.py                            # trains a small model on this repository's documentation first
    python benchmarks/jax_forward.py runs/quickstart/model      # or a model that is there

Prints the largest difference between its logits and ours on random tokens, both in float32; fails above 1e-4. The forward pass
imports nothing of PyTorch's or of ours. The last line is one JSON object; that of the model trained here is kept in
`benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import recording

recording.needs("jax", install="pip install jax")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/model", "src/bessemer/training")

LIMIT = 1e-4
ROOT = Path(__file__).parents[1]
RECIPE = f"""
format: 1
name: small
collect: [{{source: files, paths: {ROOT / "docs"}/*.md}}]
tokenize: {{vocab_size: 1024}}
model: {{preset: qwen3-1m}}
pretrain: {{steps: 40, batch_size: 4, context_length: 128, dtype: float32, compile: false, sample_points: 0,
           evaluate_tokens: 2048}}
"""

# Shapes: B batch, T time, D hidden, H query heads, K key-value heads, C channels of a head, V vocabulary.


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rotate(x_BTHC: jax.Array, theta: float) -> jax.Array:
    half = x_BTHC.shape[-1] // 2
    angles = jnp.arange(x_BTHC.shape[1])[:, None] * theta ** (-jnp.arange(half) / half)
    cosine, sine = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    first, second = x_BTHC[..., :half], x_BTHC[..., half:]
    return jnp.concatenate((first * cosine - second * sine, second * cosine + first * sine), -1)


def attention(x_BTD: jax.Array, weight: dict[str, jax.Array], config: dict[str, Any]) -> jax.Array:
    def heads(name: str, count: int) -> jax.Array:
        return (x_BTD @ weight[f"{name}_proj.weight"].T).reshape(*x_BTD.shape[:2], count, config["head_dim"])

    groups, length = config["num_attention_heads"] // config["num_key_value_heads"], x_BTD.shape[1]
    eps, theta = config["rms_norm_eps"], config["rope_theta"]
    query = rotate(rms_norm(heads("q", config["num_attention_heads"]), weight["q_norm.weight"], eps), theta)
    key = rotate(rms_norm(heads("k", config["num_key_value_heads"]), weight["k_norm.weight"], eps), theta)
    key, value = (jnp.repeat(each, groups, 2) for each in (key, heads("v", config["num_key_value_heads"])))
    scores_BHTT = jnp.einsum("bqhc,bkhc->bhqk", query, key) / config["head_dim"] ** 0.5
    scores_BHTT = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores_BHTT, -jnp.inf)
    mixed = jnp.einsum("bhqk,bkhc->bqhc", jax.nn.softmax(scores_BHTT, -1), value)
    return mixed.reshape(*x_BTD.shape[:2], -1) @ weight["o_proj.weight"].T


def logits(weights: dict[str, jax.Array], config: dict[str, Any], tokens_BT: np.ndarray) -> jax.Array:
    """Logits (B, T, V) of a Qwen3 folder's tensors."""
    eps = config["rms_norm_eps"]
    x_BTD = weights["model.embed_tokens.weight"][tokens_BT]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        of = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        inside = {name.removeprefix("self_attn."): value for name, value in of.items()}
        x_BTD = x_BTD + attention(rms_norm(x_BTD, of["input_layernorm.weight"], eps), inside, config)
        y_BTD = rms_norm(x_BTD, of["post_attention_layernorm.weight"], eps)
        gate = jax.nn.silu(y_BTD @ of["mlp.gate_proj.weight"].T) * (y_BTD @ of["mlp.up_proj.weight"].T)
        x_BTD = x_BTD + gate @ of["mlp.down_proj.weight"].T
    head = weights["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return rms_norm(x_BTD, weights["model.norm.weight"], eps) @ head.T


def ours(folder: Path, tokens_BT: np.ndarray) -> np.ndarray:
    import torch

    from bessemer.model.storage.folder import load_model

    with torch.no_grad():
        return load_model(folder, dtype=torch.float32).eval()(torch.from_numpy(tokens_BT)).numpy()


def trained(folder: Path) -> Path:
    """The model of a few quick steps, made by the pipeline as any other."""
    from bessemer.pipeline.api import run

    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return run(str(folder / "recipe.yaml"), runs=folder / "runs").folder / "model"


def compare(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "qwen3":
        raise SystemExit(f"{folder}: this reads qwen3 folders, not {config['model_type']}")
    weights: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= {name: jnp.asarray(value, jnp.float32) for name, value in load_file(file).items()}
    shape = (2, min(128, config["max_position_embeddings"]))
    tokens_BT = np.random.default_rng(0).integers(0, config["vocab_size"], shape)
    with jax.default_matmul_precision("highest"):
        theirs = np.asarray(logits(weights, config, tokens_BT))
    mine = ours(folder, tokens_BT)
    return {
        "parameters": sum(value.size for value in weights.values()),
        "largest_difference": float(np.abs(theirs - mine).max()),
        "largest_logit": float(np.abs(mine).max()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="A Qwen3 model's folder.")
    given = parser.parse_args().model
    with tempfile.TemporaryDirectory() as scratch:
        found = compare(given or trained(Path(scratch)))
    print(f"{found['parameters']:,} parameters: logits of JAX and ours differ by {found['largest_difference']:.1e} at most")
    print(json.dumps(found))
    if given is None:
        columns = [("parameters", ",d"), ("logits of JAX and ours differ by at most", ".1e"), ("largest logit", ".1f")]
        recording.save("jax_forward", found, tables={"logits": recording.table(columns, [list(found.values())])}, peers=["jax"])
    return 0 if found["largest_difference"] <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
