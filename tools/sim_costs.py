"""What each program of a simulated pod takes (`sim_rollout.py`), for Qwen2.5-7B:

decode     the bytes it must read (weights once a step, the cache of each sequence), times `Costs.decode_over_floor`
prefill    its FLOPs at `plan.estimate.KERNEL_EFFICIENCY` of the peak
learner    the plan of a full micro-batch: what it takes beside attention, full or not, and attention by the pairs
           of blocks that `model/flash.py` goes over on the chip with most of them
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from dr_jax import chips
from dr_jax.model import weights
from dr_jax.model.config import QWEN2_5
from dr_jax.model.splash import block
from dr_jax.plan.estimate import KERNEL_EFFICIENCY

_MODEL = QWEN2_5["7B"]
_PARAMS = weights.count(_MODEL)
_WEIGHT_BYTES = 2 * _PARAMS  # bfloat16, as the KV cache
_KV_BYTES = 2 * 2 * _MODEL.num_layers * _MODEL.num_kv_heads * _MODEL.head_dim  # of one token
_ATTENTION_FLOPS = 4 * _MODEL.num_layers * _MODEL.num_heads * _MODEL.head_dim  # of one token for one before it


def block_pairs(tokens: Sequence[int], length: int) -> int:
    """Pairs of blocks (queries, keys) that attention goes over in a row of `length` whose segments have so many
    `tokens`: from where the first segment of a block begins up to the block itself; padding sees itself alone."""
    ends, at = np.cumsum([0, *tokens]), np.arange(0, length, block(length))
    begins = np.where(at < ends[-1], ends[np.searchsorted(ends, at, "right") - 1], at)
    return int((at // block(length) - begins // block(length) + 1).sum())


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds of each program; an engine spans the chips of one host."""

    topology: str = "v5p:4x4x4"  # configs/deepresearcher_7b_v5p128.py
    decode_over_floor: float = 1.5  # the goal set for the engine (docs/benchmarks.md says how far it is)
    rows: tuple[int, ...] = (32768,)  # lengths of the learner's rows, in tokens, rising
    # tools/plan.py for this slice: matrix, memory and exposed, then kernels, of 64 micro-batches of a full row a chip
    # (docs/sharding.md).
    learner_token_s: float = (311.5980 + 18.2105 + 8.5721) / (64 * 32768)
    learner_pair_s: float = 143.0288 / (64 * block_pairs([32768], 32768))

    @functools.cached_property
    def piece(self) -> chips.Slice:
        return chips.find(self.topology)

    @property
    def hosts(self) -> int:
        return self.piece.chips // self.piece.chip.host_chips

    def decode_s(self, kv_tokens: int) -> float:
        """One token of each sequence, where the sequences hold `kv_tokens` together."""
        chip = self.piece.chip
        floor_s = (_WEIGHT_BYTES + kv_tokens * _KV_BYTES) / (chip.hbm_bytes_per_s * chip.host_chips)
        return self.decode_over_floor * floor_s

    def prefill_s(self, tokens: int, token_pairs: float) -> float:
        """`tokens` new ones that look at `token_pairs` (token, earlier token) pairs."""
        chip = self.piece.chip
        flops = 2 * _PARAMS * tokens + _ATTENTION_FLOPS * token_pairs
        read_s = _WEIGHT_BYTES / (chip.hbm_bytes_per_s * chip.host_chips)
        return max(flops / (chip.flops_per_s * chip.host_chips * KERNEL_EFFICIENCY), read_s)

    def learner_s(self, micro_batches: Sequence[int]) -> float:
        """So many micro-batches, of each the `block_pairs` on the chip with most, for which the others wait."""
        return sum(self.rows[-1] * self.learner_token_s + pairs * self.learner_pair_s for pairs in micro_batches)

    def micro_rows(self, length: int) -> int:
        """Of `length`, those that a host brings to a micro-batch: each chip has the tokens of a longest row."""
        return self.piece.chip.host_chips * self.rows[-1] // length

    def attended(self, rows: Sequence[Sequence[int]], length: int) -> list[int]:
        """Of each micro-batch of a host's `rows` (tokens of their segments), dealt to its chips in turn: `block_pairs`
        on the chip with most."""
        pairs = [block_pairs(row, length) for row in rows]
        size, host_chips = self.micro_rows(length), self.piece.chip.host_chips
        starts = range(0, len(pairs), size)
        return [max(sum(pairs[at : at + size][n::host_chips]) for n in range(host_chips)) for at in starts]
