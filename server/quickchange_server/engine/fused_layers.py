"""A Llama-shaped base run block by block with fused kernels between its products, for GPUs.

Says which bases it can run. What it computes, the Hugging Face modules compute too, in some thirty
launches a layer more; that way stays, for every other base, and as this one's oracle. Knows no
queues and no requests. Import it only where Triton is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from quickchange_adapters.layers import ProjectionGroup
from quickchange_adapters.plan import Projection
from torch import Tensor

from quickchange_server.engine.attention import AttentionStep, KvStorage, Rule
from quickchange_server.engine.base_model import BaseModel
from quickchange_server.engine.native_step import (
    ACTIVATIONS,
    MODEL_TYPES,
    ROLES,
    head_width,
    kind_of,
)
from quickchange_server.engine.triton_pointwise import (
    HeadNorm,
    add_and_norm,
    gated,
    rotate_and_store,
)


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder block: its norms' weights, and its projection groups."""

    attention_norm: Tensor
    feed_forward_norm: Tensor
    head_norm: HeadNorm | None
    qkv: ProjectionGroup
    output: ProjectionGroup
    gate_up: ProjectionGroup
    down: ProjectionGroup


class FusedLayers:
    """All blocks of a base over its KV storage. Called by the engine thread alone."""

    def __init__(self, base: BaseModel, storage: KvStorage, rules: Sequence[Rule]) -> None:
        self._storage = storage
        self._rules = rules
        self._rotary = base.model.model.rotary_emb
        self._final_norm = base.model.model.norm.weight.data
        self._epsilon = float(base.config.rms_norm_eps)
        self._is_gelu = bool(ACTIVATIONS[base.config.hidden_act])
        kinds = {role: kind_of(base, tail) for role, tail in ROLES}
        self._blocks = [
            _block(block, {role: base.groups[kind, layer] for role, kind in kinds.items()})
            for layer, block in enumerate(base.model.model.layers)
        ]
        self._num_heads = int(base.config.num_attention_heads)

    def run(self, embeds: Tensor, positions: Tensor, step: AttentionStep) -> Tensor:
        """Return what the head is to see, [tokens, width]; embeds [tokens, width] is overwritten.

        positions: [tokens]; the step's tiles compute its attention.
        """
        assert step.tiles is not None
        cosines, sines = self._rotary(embeds, positions[None])
        rotary = cosines[0].contiguous(), sines[0].contiguous()
        hidden, x = embeds, self._norm(embeds, None, self._blocks[0].attention_norm)
        num_tokens, width = embeds.shape[0], self._blocks[0].output.shape.in_features
        # zeros: rows of padding are computed by nobody
        mixed = embeds.new_zeros(num_tokens, self._num_heads, width // self._num_heads)
        next_norms = [*(block.attention_norm for block in self._blocks[1:]), self._final_norm]
        for layer, (block, next_norm) in enumerate(zip(self._blocks, next_norms, strict=True)):
            self._attend(layer, block.qkv.project(x), rotary, step, mixed)
            update = block.output.project(mixed.view(num_tokens, width))
            x = self._norm(hidden, update, block.feed_forward_norm)
            active = gated(block.gate_up.project(x), is_gelu=self._is_gelu)
            x = self._norm(hidden, block.down.project(active), next_norm)
        return x

    def _attend(
        self,
        layer: int,
        projection: Projection,
        rotary: tuple[Tensor, Tensor],
        step: AttentionStep,
        out: Tensor,
    ) -> None:
        qkv = projection.output
        kv = self._storage.keys[layer], self._storage.values[layer]
        norm = self._blocks[layer].head_norm
        rotate_and_store(projection, rotary, step.slots, kv, norm, self._epsilon)
        heads = qkv.view(qkv.shape[0], -1, kv[0].shape[3])[:, : self._num_heads]
        assert step.tiles is not None
        query, rule = heads.transpose(0, 1), self._rules[layer]
        step.tiles.attend(self._storage, layer, query, rule, out)

    def _norm(self, hidden: Tensor, update: Projection | None, weight: Tensor) -> Tensor:
        return add_and_norm(hidden, update, weight, self._epsilon)


def _block(block: Any, groups: dict[str, ProjectionGroup]) -> Block:
    attention = block.self_attn
    norm = None
    if getattr(attention, "q_norm", None) is not None:
        norm = HeadNorm(attention.q_norm.weight.data, attention.k_norm.weight.data)
    return Block(
        block.input_layernorm.weight.data,
        block.post_attention_layernorm.weight.data,
        norm,
        **groups,
    )


def fused_refusal(base: BaseModel) -> str | None:
    """Say why a base's blocks cannot be run so; None if they can."""
    config = base.model.config
    if config.model_type not in MODEL_TYPES:
        return f"{config.model_type!r} is not of Llama's shape"
    if config.hidden_act not in ACTIVATIONS:
        return f"its activation is {config.hidden_act!r}"
    if getattr(config, "pretraining_tp", 1) != 1:
        return "its linears are sliced (pretraining_tp)"
    if base.head is None:
        return "its head is no linear"
    parts = {role: base.groups[kind_of(base, tail), 0].shape for role, tail in ROLES}
    if (parts["qkv"].num_parts, parts["gate_up"].num_parts) != (3, 2):
        return "its projections are not fused"
    like = torch.empty(1, dtype=base.dtype, device=base.device)
    positions = torch.zeros(1, 1, dtype=torch.long, device=base.device)
    rotated = base.model.model.rotary_emb(like, positions)[0].shape[-1]
    if rotated != head_width(config):
        return f"it rotates {rotated} of {head_width(config)} columns of a head"
    return None
