"""Picture encoders: patches in, a state of each out. SigLIP and SigLIP2, CLIP, and Idefics3's.

A transformer over the patches of a picture (Dosovitskiy et al. 2021), every patch sees every other. They differ in how patches
get their positions. SigLIP (Zhai et al. 2023) and CLIP (Radford et al. 2021) read squares of one size. Idefics3 and SmolVLM
spread the square's positions over any number of patches by their place in the picture (NaViT, Dehghani et al. 2023). SigLIP2
(Tschannen et al. 2025) reads a picture in its own shape, and resizes the square's positions to it.

Modules are called as the tensors in Hugging Face's files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from bessemer.model.vision.config import VisionConfig

# Shapes: N pictures or tiles, L patches, D hidden, H heads, C channels of a head, P pixels along a patch.

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_new": lambda hidden: functional.gelu(hidden, approximate="tanh"),
    "gelu_pytorch_tanh": lambda hidden: functional.gelu(hidden, approximate="tanh"),
    "quick_gelu": lambda hidden: hidden * torch.sigmoid(1.702 * hidden),
    "relu": functional.relu,
    "silu": functional.silu,
}


class Pixels(NamedTuple):
    """Pictures, or tiles of them, as an encoder reads them.

    values: (N, 3, height, width), or patches (N, L, P · P · 3). mask: True for patches that are no padding, (N, rows, columns)
    or (N, L); None: all. shapes: of patches, the rows and columns of each picture, (N, 2).
    """

    values: Tensor
    mask: Tensor | None = None
    shapes: Tensor | None = None

    @classmethod
    def joined(cls, pictures: Sequence[Pixels]) -> Pixels:
        """Pictures in their own shapes as one sequence of patches, (L, …)."""
        return cls(
            torch.cat([one.values for one in pictures]), shapes=torch.cat([cast(Tensor, one.shapes) for one in pictures])
        )

    def chosen(self, pictures_N: Tensor) -> Pixels:
        """Some of the pictures or tiles, by their numbers. Of patches that follow each other, (L, …), those of these."""
        if self.shapes is None or self.mask is not None:
            parts = (None if part is None else part[pictures_N.to(part.device)] for part in self)
            return Pixels(*cast(tuple[Tensor, Tensor | None, Tensor | None], tuple(parts)))
        pictures_N = pictures_N.to(self.shapes.device)
        patches = self.values.split(self.shapes.prod(1).tolist())
        return Pixels(torch.cat([patches[number] for number in pictures_N.tolist()]), shapes=self.shapes[pictures_N])


class PatchEmbeddings(nn.Module):
    """Patches as vectors, with what tells their places."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        size, patch = config.hidden_size, config.patch_size
        if config.takes_patches:
            self.patch_embedding: nn.Module = nn.Linear(config.num_channels * patch**2, size)
        else:
            has_bias = not config.has_class_token
            self.patch_embedding = nn.Conv2d(config.num_channels, size, kernel_size=patch, stride=patch, bias=has_bias)
        if config.has_class_token:
            self.class_embedding = nn.Parameter(torch.empty(size))
        self.position_embedding = nn.Embedding(config.grid**2 + config.has_class_token, size)

    def forward(self, pixels: Pixels) -> Tensor:
        """(N, L, D), the class token first where there is one."""
        config, table = self.config, self.position_embedding.weight
        values = pixels.values.to(table.dtype)
        if config.takes_patches:
            assert pixels.shapes is not None, "patches come with the shapes of their pictures"
            positions_NLD = resized_positions(table.unflatten(0, (config.grid, -1)), pixels.shapes, values.shape[1])
            return cast(Tensor, self.patch_embedding(values)) + positions_NLD
        patches: Tensor = self.patch_embedding(values)
        rows, columns = patches.shape[-2:]
        embedded_NLD = patches.flatten(2).transpose(1, 2)
        if config.has_class_token:
            classes_N1D = self.class_embedding.expand(len(embedded_NLD), 1, -1)
            embedded_NLD = torch.cat([classes_N1D, embedded_NLD], dim=1)
        if config.model_type in ("idefics3_vision", "smolvlm_vision"):
            mask = pixels.mask
            if mask is None:
                mask = torch.ones(len(values), rows, columns, dtype=torch.bool, device=values.device)
            return embedded_NLD + self.position_embedding(spread_positions(mask, config.grid))
        return embedded_NLD + table


def spread_positions(mask: Tensor, grid: int) -> Tensor:
    """The learnt position of each patch of pictures with any number of patches, (N, rows · columns), 0 for padding.

    mask: True for a picture's patches, which lie in its upper left, (N, rows, columns). A patch at r of R rows has the row
    floor(grid · r / R) of the square, computed in float32 by boundaries, as the models were trained with.
    """
    device = mask.device
    boundaries = torch.arange(1 / grid, 1.0, 1 / grid, device=device)
    parts = []
    for axis in (1, 2):
        counts_N = mask[:, :, 0].sum(1) if axis == 1 else mask[:, 0, :].sum(1)
        places = torch.arange(mask.shape[axis], device=device, dtype=torch.float32)[None] * (1.0 / counts_N)[:, None]
        parts.append(torch.bucketize(places.clamp(max=1.0 - 1e-6), boundaries, right=True))
    places = parts[0][:, :, None] * grid + parts[1][:, None, :]
    return torch.where(mask, places, 0).flatten(1)


def resized_positions(table: Tensor, shapes: Tensor, length: int) -> Tensor:
    """A square's learnt positions, (grid, grid, D), resized to the shape of each picture, (N, length, D).

    Bilinear with antialiasing, computed in float32. What is beyond a picture's patches repeats its first.
    """
    table_DHW = table.permute(2, 0, 1)[None].float()
    resized = []
    for rows, columns in shapes.tolist():
        positions = functional.interpolate(
            table_DHW, size=(rows, columns), mode="bilinear", align_corners=False, antialias=True
        )
        positions_LD = positions[0].flatten(1).T
        padding_LD = positions_LD[:1].expand(length - rows * columns, -1)
        resized.append(torch.cat([positions_LD, padding_LD]))
    return torch.stack(resized).to(table.dtype)


class EncoderAttention(nn.Module):
    """Attention among all patches of a picture."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, size)
        self.v_proj = nn.Linear(size, size)
        self.out_proj = nn.Linear(size, size)

    def forward(self, hidden_NLD: Tensor, mask: Tensor | None) -> Tensor:
        """mask: (N, 1, 1, L), True where a patch may be seen; None: everywhere."""
        query, key, value = (
            projection(hidden_NLD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        seen_NHLC = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return cast(Tensor, self.out_proj(seen_NHLC.transpose(1, 2).flatten(2)))


class EncoderMlp(nn.Module):
    """The feed-forward network of a layer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self._activation = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden_NLD: Tensor) -> Tensor:
        return cast(Tensor, self.fc2(self._activation(self.fc1(hidden_NLD))))


class VisionLayer(nn.Module):
    """Attention and a feed-forward network, each behind a norm and added to what it reads."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = EncoderAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = EncoderMlp(config)

    def forward(self, hidden_NLD: Tensor, mask: Tensor | None) -> Tensor:
        hidden_NLD = hidden_NLD + self.self_attn(self.layer_norm1(hidden_NLD), mask)
        return hidden_NLD + cast(Tensor, self.mlp(self.layer_norm2(hidden_NLD)))


class PoolingHead(nn.Module):
    """SigLIP's pooling: a learnt query attends to all patches, and a feed-forward network follows."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.attention = nn.MultiheadAttention(config.hidden_size, config.num_attention_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = EncoderMlp(config)

    def forward(self, hidden_NLD: Tensor, mask_NL: Tensor | None) -> Tensor:
        """One vector of each picture, (N, D)."""
        probe_N1D = self.probe.expand(len(hidden_NLD), -1, -1)
        padding = None if mask_NL is None else ~mask_NL
        pooled_N1D, _ = self.attention(probe_N1D, hidden_NLD, hidden_NLD, key_padding_mask=padding, need_weights=False)
        pooled_ND: Tensor = (pooled_N1D + self.mlp(self.layernorm(pooled_N1D)))[:, 0]
        return pooled_ND


class LayerStack(nn.Module):
    """The layers of an encoder."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))


class VisionEncoder(nn.Module):
    """Pictures in, a state of each patch out."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = PatchEmbeddings(config)
        if config.has_class_token:
            # as CLIP's files spell it
            self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.encoder = LayerStack(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        if config.has_head:
            self.head = PoolingHead(config)

    def forward(self, pixels: Pixels) -> Tensor:
        """States after the last norm, (N, L, D); of CLIP, whose norm is for its class token alone, those before it."""
        (hidden_NLD,) = self.states(pixels, [self.config.num_hidden_layers])
        return hidden_NLD if self.config.has_class_token else cast(Tensor, self.post_layernorm(hidden_NLD))

    def pooled(self, pixels: Pixels) -> Tensor:
        """One vector of each picture, (N, D): SigLIP's pooling, or CLIP's normed class token."""
        if self.config.has_class_token:
            return cast(Tensor, self.post_layernorm(self(pixels)[:, 0]))
        assert self.config.has_head, "an encoder without a head pools nothing"
        return cast(Tensor, self.head(self(pixels), None if pixels.mask is None else pixels.mask.flatten(1).bool()))

    def states(self, pixels: Pixels, layers: Sequence[int]) -> list[Tensor]:
        """States after these layers, each (N, L, D), without the last norm: 0 are the embeddings, -1 is the last layer.

        No layer above the last that is wanted is computed.
        """
        count = self.config.num_hidden_layers + 1
        wanted = [layer % count for layer in layers]
        hidden_NLD = self.embeddings(pixels)
        if self.config.has_class_token:
            hidden_NLD = self.pre_layrnorm(hidden_NLD)
        mask = None
        if pixels.mask is not None and not bool(pixels.mask.all()):
            mask = pixels.mask.flatten(1).bool()[:, None, None, :]
        kept = {0: hidden_NLD}
        for number, layer in enumerate(self.encoder.layers[: max(wanted)], start=1):
            hidden_NLD = layer(hidden_NLD, mask)
            if number in wanted:
                kept[number] = hidden_NLD
        return [kept[layer] for layer in wanted]
