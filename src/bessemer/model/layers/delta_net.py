"""Gated DeltaNet (Yang et al. 2024), the linear attention of Qwen3-Next: a state in place of a growing cache.

The state S maps keys to values. At each token it fades by α, what it holds for the key k is read, and the difference to
the value v is written back with strength β:

    S ← α S;    S ← S + β k (v - Sᵀ k)ᵀ;    output = Sᵀ q

`RecurrentLayer` is what every attention with a state in place of keys and values has: which tokens of a batch go on from which
states.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from bessemer.model.attention.delta_net import CHUNK
from bessemer.model.config import ModelConfig
from bessemer.model.layers.attention import AttentionLayer, InitialDraw, TensorSharder, ones
from bessemer.model.layers.attention_mask import AttentionMask
from bessemer.model.layers.cache import Cache, Rectangle
from bessemer.model.layers.norms import Fold, after_norm
from bessemer.model.layers.positions import Rotation

# Shapes: B batch, T time, D hidden, O inputs of the last product.


class RecurrentLayer(AttentionLayer):
    """Products for each token alone (`project`), a recurrence over the tokens of a sequence (`mix`), and a last product.

    The products read their weights once for all rows, however those lie; the recurrence sees rows that are sequences.
    """

    layer: int

    def project(self, hidden_BTD: Tensor) -> tuple[Tensor, ...]:
        """What the recurrence reads, each (B, T, …)."""
        raise NotImplementedError

    def mix(
        self,
        projected: tuple[Tensor, ...],
        documents_BT: Tensor | None,
        real_BT: Tensor | None,
        state: tuple[Tensor, ...] | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What the last product reads, (B, T, O), and the state after these tokens, tensors with a row per sequence.

        documents_BT: of packed documents; the state starts from zero at each. real_BT: which tokens are no padding; padding
        leaves the state as it is. None: all. state: before these tokens; None at the beginning.
        """
        raise NotImplementedError

    def forward(self, hidden_BTD: Tensor, rotation: Rotation | None, mask: AttentionMask, cache: Cache | None) -> Tensor:
        projection, _ = self.output
        return projection(self._mixed(self.project(hidden_BTD), mask.documents_BT, cache))

    def _mixed(self, projected: tuple[Tensor, ...], documents_BT: Tensor | None, cache: Cache | None) -> Tensor:
        if cache is None:
            return self.mix(projected, documents_BT, None, None)[0]
        rectangles = cache.rectangles()
        if rectangles is None:
            mixed_BTO, state = self.mix(projected, documents_BT, cache.real_BT, cache.state(self.layer))
            cache.store_state(self.layer, *state)
            return mixed_BTO
        mixed = [self._mix_rectangle(projected, rectangle, cache) for rectangle in rectangles]
        mixed_BTO = mixed[0].new_empty(*projected[0].shape[:2], mixed[0].shape[-1])
        for rectangle, rows_BTO in zip(rectangles, mixed, strict=True):
            mixed_BTO[0, rectangle.rows_BT] = rows_BTO
        return mixed_BTO

    def _mix_rectangle(self, projected: tuple[Tensor, ...], rectangle: Rectangle, cache: Cache) -> Tensor:
        """Some sequences of a ragged batch, all with as many new tokens, (B, T, O)."""
        rows = tuple(part[0, rectangle.rows_BT] for part in projected)
        state = cache.state(self.layer, rectangle)
        if not rectangle.every_step:
            mixed_BTO, state = self.mix(rows, None, None, state)
            cache.store_state(self.layer, *state, rectangle=rectangle)
            return mixed_BTO
        mixed = []
        for step, token in enumerate(zip(*(part.split(1, dim=1) for part in rows), strict=True)):
            mixed_B1O, state = self.mix(token, None, None, state)
            cache.store_state(self.layer, *state, rectangle=rectangle, step=step)
            mixed.append(mixed_B1O)
        return torch.cat(mixed, dim=1)


# Shapes: B batch, T time, D hidden, W width of the convolution's channels, H value heads, K key heads, C channels of a key,
# V of a value, N chunks, M tokens of a chunk, P query, key, value and gate of all heads, G strength and fading of all, O width
# of the output before it is projected.


def _log_rates(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Logarithms of rates of fading that are uniform in 0 … 16."""
    return torch.empty(shape).uniform_(0.01, 16.0, generator=generator).log()


class GatedDeltaNet(RecurrentLayer):
    """Projections, a short causal convolution, the gated delta rule, a gated norm."""

    initial: ClassVar[Mapping[str, InitialDraw]] = {"linear_attn.norm.weight": ones, "A_log": _log_rates, "dt_bias": ones}

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.key_heads = config.linear_num_key_heads
        self.value_heads = config.linear_num_value_heads
        self.key_dim = config.linear_key_head_dim
        self.value_dim = config.linear_value_head_dim
        self.kernel = config.linear_conv_kernel_dim
        key_width, value_width = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        # rows lie by key head: its query, key, and the values and gates of its group
        self.in_proj_qkvz = nn.Linear(config.hidden_size, 2 * key_width + 2 * value_width, bias=False)
        self.in_proj_ba = nn.Linear(config.hidden_size, 2 * self.value_heads, bias=False)
        self.conv1d = nn.Conv1d(width := 2 * key_width + value_width, width, self.kernel, groups=width, bias=False)
        self.dt_bias = nn.Parameter(torch.ones(self.value_heads))
        self.A_log = nn.Parameter(torch.zeros(self.value_heads))
        self.norm = GatedNorm(self.value_dim, config.rms_norm_eps)
        self.out_proj = nn.Linear(value_width, config.hidden_size, bias=False)

    def project(self, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        return self.in_proj_qkvz(hidden_BTD), self.in_proj_ba(hidden_BTD)

    @property
    def output(self) -> tuple[nn.Linear, int]:
        return self.out_proj, self.value_heads

    def shard(self, sharder: TensorSharder) -> None:
        """Shard by key heads, whose rows are adjacent. The convolution has all queries, then all keys, then all values: its
        kernels, which are small, are replicated, and a rank uses those of its heads."""
        sharder.shard_outputs(self.in_proj_qkvz, self.in_proj_ba)
        sharder.shard_inputs(self.out_proj)
        sharder.shard_parameters(self, dt_bias=0, A_log=0)
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        channels = torch.arange(2 * keys + values).split((keys, keys, values))
        sharder.replicate(self.norm, self.conv1d)
        own = torch.cat([part.chunk(sharder.ranks)[sharder.rank] for part in channels])
        sharder.use_rows(self.conv1d, "weight", own)
        self.key_heads //= sharder.ranks
        self.value_heads //= sharder.ranks
        # not cast: the state is computed in the dtype of the input
        sharder.gather_inputs(self, cast=False)

    def folds(self, norm: nn.Module) -> Iterator[Fold]:
        yield from after_norm(norm, ("in_proj_qkvz",), ("in_proj_ba",))

    def mix(
        self,
        projected: tuple[Tensor, ...],
        documents_BT: Tensor | None,
        real_BT: Tensor | None,
        state: tuple[Tensor, ...] | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        qkvz_BTP, ba_BTG = projected
        group = self.value_heads // self.key_heads
        query, key, value, gate = qkvz_BTP.unflatten(-1, (self.key_heads, -1)).split(
            (self.key_dim, self.key_dim, group * self.value_dim, group * self.value_dim), dim=-1
        )
        strength, fading = ba_BTG.unflatten(-1, (self.key_heads, -1)).chunk(2, dim=-1)
        mixed_BTW = torch.cat([part.flatten(2) for part in (query, key, value)], dim=-1)
        mixed_BTW, tail_BTW = self._convolve(mixed_BTW, state[0] if state else None, documents_BT, real_BT)
        key_width = self.key_heads * self.key_dim
        query, key, value = mixed_BTW.split((key_width, key_width, self.value_heads * self.value_dim), dim=-1)
        query_BTHC, key_BTHC = (
            unit(_wide(part.unflatten(-1, (self.key_heads, -1)))).repeat_interleave(group, dim=2) for part in (query, key)
        )
        value_BTHV = _wide(value.unflatten(-1, (self.value_heads, -1)))
        strength_BTH = _wide(strength.flatten(2)).sigmoid()
        log_fading_BTH = -_wide(self.A_log).exp() * functional.softplus(_wide(fading.flatten(2)) + self.dt_bias)
        # padding neither fades the state nor writes to it
        if real_BT is not None:
            strength_BTH, log_fading_BTH = (part * real_BT[..., None] for part in (strength_BTH, log_fading_BTH))
        if documents_BT is not None:
            log_fading_BTH = log_fading_BTH.masked_fill(document_starts(documents_BT)[..., None], FORGET)
        memory_BHCV = state[1] if state else None
        rule = delta_rule_stepwise if qkvz_BTP.shape[1] == 1 else delta_rule_chunked
        attended_BTHV, memory_BHCV = rule(
            query_BTHC * self.key_dim**-0.5, key_BTHC, value_BTHV, strength_BTH, log_fading_BTH, memory_BHCV
        )
        attended_BTHV = attended_BTHV.to(qkvz_BTP.dtype)
        normed_BTHV = self.norm(attended_BTHV, gate.reshape(attended_BTHV.shape))
        return normed_BTHV.flatten(2), (tail_BTW, memory_BHCV)

    def _convolve(
        self, mixed_BTW: Tensor, tail_BTW: Tensor | None, documents_BT: Tensor | None, real_BT: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Each channel mixed with its last `kernel` values; and the last of them, for the next tokens."""
        before = self.kernel - 1
        if tail_BTW is None:
            tail_BTW = mixed_BTW.new_zeros(mixed_BTW.shape[0], before, mixed_BTW.shape[2])
        whole_BTW = torch.cat((tail_BTW.to(mixed_BTW.dtype), mixed_BTW), dim=1)
        if documents_BT is None:
            convolved = functional.conv1d(whole_BTW.transpose(1, 2), self.conv1d.weight, groups=whole_BTW.shape[2])
            convolved_BTW = convolved.transpose(1, 2)
        else:
            # tap by tap: values of another document count as 0
            ids_BT = functional.pad(documents_BT, (before, 0), value=-1)
            length = mixed_BTW.shape[1]
            convolved_BTW = sum(
                whole_BTW[:, tap : tap + length]
                * (ids_BT[:, tap : tap + length] == documents_BT)[..., None]
                * self.conv1d.weight[:, 0, tap]
                for tap in range(self.kernel)
            )  # type: ignore[assignment]
        if real_BT is None:
            tail_BTW = whole_BTW[:, whole_BTW.shape[1] - before :]
        else:
            last = real_BT.sum(1, keepdim=True) + torch.arange(before, device=real_BT.device)
            tail_BTW = whole_BTW.gather(1, last[..., None].expand(-1, -1, whole_BTW.shape[2]))
        return functional.silu(convolved_BTW), tail_BTW


class GatedNorm(nn.Module):
    """weight · x / rms(x) · silu(gate)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: Tensor, gate: Tensor) -> Tensor:
        """hidden, gate: (..., width). Returns the same shape."""
        normed = functional.rms_norm(hidden.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)
        return (normed * functional.silu(_wide(gate))).to(hidden.dtype)


def _wide(tensor: Tensor) -> Tensor:
    """In float32, or in float64 where it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def unit(vectors: Tensor, eps: float = 1e-6) -> Tensor:
    """Vectors of length 1 along the last dimension."""
    return vectors * torch.rsqrt(vectors.square().sum(-1, keepdim=True) + eps)


#: Log of a fading after which nothing is left in float32; no lower, because sums over a chunk would lose digits.
FORGET = -40.0


def document_starts(documents_BT: Tensor) -> Tensor:
    """Where a document begins that is another than the token's before it, (B, T)."""
    changes = documents_BT[:, 1:] != documents_BT[:, :-1]
    return functional.pad(changes, (1, 0), value=False)


def delta_rule_stepwise(
    query_BTHC: Tensor,
    key_BTHC: Tensor,
    value_BTHV: Tensor,
    strength_BTH: Tensor,
    log_fading_BTH: Tensor,
    state_BHCV: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The rule as it is written above, token by token: outputs (B, T, H, V) and the state after them, (B, H, C, V)."""
    if state_BHCV is None:
        state_BHCV = value_BTHV.new_zeros(key_BTHC.shape[0], *key_BTHC.shape[2:], value_BTHV.shape[-1])
    outputs = []
    for step in range(query_BTHC.shape[1]):
        key_BHC = key_BTHC[:, step]
        state_BHCV = state_BHCV * log_fading_BTH[:, step, :, None, None].exp()
        missing_BHV = value_BTHV[:, step] - torch.einsum("bhcv,bhc->bhv", state_BHCV, key_BHC)
        written_BHV = missing_BHV * strength_BTH[:, step, :, None]
        state_BHCV = state_BHCV + key_BHC[..., None] * written_BHV[..., None, :]
        outputs.append(torch.einsum("bhcv,bhc->bhv", state_BHCV, query_BTHC[:, step]))
    return torch.stack(outputs, dim=1), state_BHCV


def delta_rule_chunked(
    query_BTHC: Tensor,
    key_BTHC: Tensor,
    value_BTHV: Tensor,
    strength_BTH: Tensor,
    log_fading_BTH: Tensor,
    state_BHCV: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The same in chunks of 64 tokens, each a few matrix products (Yang et al. 2024, section 3.3).

    Inside a chunk that begins with state S, and with g the fading since its beginning, what token t writes is
    w_t = β_t (v_t - g_t Sᵀ k_t - Σ_{s<t} (g_t / g_s) (k_s · k_t) w_s): a triangular system (I + A) W = β (V - g K S).
    """
    length = query_BTHC.shape[1]
    padding = -length % CHUNK
    query, key, value = (
        functional.pad(part, (0, 0, 0, 0, 0, padding)).transpose(1, 2).unflatten(2, (-1, CHUNK))
        for part in (query_BTHC, key_BTHC, value_BTHV)
    )  # (B, H, N, M, C or V)
    strength, log_fading = (
        functional.pad(part, (0, 0, 0, padding)).transpose(1, 2).unflatten(2, (-1, CHUNK))
        for part in (strength_BTH, log_fading_BTH)
    )  # (B, H, N, M)
    since_start = log_fading.cumsum(-1)
    between = (since_start[..., :, None] - since_start[..., None, :]).masked_fill(
        torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=query.device).triu(1), -torch.inf
    )
    # share of what token s wrote that is left at token t
    fading_MM = between.exp()
    system = (key * strength[..., None]) @ key.transpose(-1, -2) * fading_MM
    right = torch.cat((value, key * since_start.exp()[..., None]), dim=-1) * strength[..., None]
    solved = torch.linalg.solve_triangular(system.tril(-1), right, upper=False, unitriangular=True)
    # what the chunk writes without an old state, and what it reads of the old state
    written, read = solved.split((value.shape[-1], key.shape[-1]), dim=-1)
    seen_inside = query @ key.transpose(-1, -2) * fading_MM
    query_faded = query * since_start.exp()[..., None]
    key_left = key * (since_start[..., -1:] - since_start).exp()[..., None]
    if state_BHCV is None:
        state_BHCV = value_BTHV.new_zeros(key_BTHC.shape[0], *key_BTHC.shape[2:], value_BTHV.shape[-1])
    outputs = []
    for chunk in range(query.shape[2]):
        new = written[:, :, chunk] - read[:, :, chunk] @ state_BHCV
        outputs.append(query_faded[:, :, chunk] @ state_BHCV + seen_inside[:, :, chunk] @ new)
        state_BHCV = state_BHCV * since_start[:, :, chunk, -1, None, None].exp() + key_left[:, :, chunk].transpose(-1, -2) @ new
    return torch.cat(outputs, dim=2)[:, :, :length].transpose(1, 2), state_BHCV
