"""The registry of attention variants: `full_attention` and `sliding_attention` are grouped-query or latent, `linear_attention`
is gated DeltaNet.

A variant carries what depends on it: names and figures in its file here, without PyTorch, and the module in `model/layers/`,
which shards itself and says where adapters and scales go in. The rest of the code asks the variant of a layer (`base.py`).
"""

from __future__ import annotations

from typing import Literal

#: Types of layers, as a model's `layer_types` names them.
LayerType = Literal["full_attention", "sliding_attention", "linear_attention"]

#: `module:class` of each variant, below this package.
VARIANTS = ("grouped_query:GroupedQuery", "latent:Latent", "delta_net:DeltaNet")
