"""One call per step: a Llama-shaped base run by the native library, adapters included.

Says which bases it can run, hands the library the model once, and each step's tables. What the
library computes, the Hugging Face modules compute too, slower; that way stays, for every other
base and CPU, and as this one's oracle. Knows no queues and no requests.
"""

import ctypes
import weakref
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from quickchange_adapters.merge import MergedCopy
from quickchange_adapters.native import library as native
from quickchange_adapters.native.weight import NativeInt8Weight, NativeWeight
from quickchange_adapters.ops.linear_weight import LinearWeight
from quickchange_adapters.plan import RowBlock
from quickchange_adapters.pool import AdapterPool
from torch import Tensor, nn

from quickchange_server.engine.attention import KvStorage, Rule

if TYPE_CHECKING:
    from quickchange_server.engine.base_model import BaseModel

ROLES = (
    ("qkv", "self_attn.q_proj"),
    ("output", "self_attn.o_proj"),
    ("gate_up", "mlp.gate_proj"),
    ("down", "mlp.down_proj"),
)
"""The library's groups in its order: field of a layer, first linear."""
STAGES = (
    *("attention norm", "A of qkv", "qkv", "rotate and store", "attention"),
    *("A of output", "output", "feed-forward norm", "A of gate and up", "gate and up"),
    *("A of down", "down", "final norm", "head"),
)
"""The library's stages in its order; `A of` are the adapters' first halves, the second are in the
product's own stage."""
MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
ACTIVATIONS = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1}
KEYS_TOGETHER = 16
"""KV blocks hold a multiple of this: the positions that are scored side by side."""
LANES = 32
"""Widths are multiples of this: the bfloat16 numbers of one register."""


def native_refusal(model: Any, block_size: int) -> str | None:
    """Say why the library cannot run a Hugging Face model over such KV blocks; None if it can."""
    config = model.config  # of a model that holds another, the outer one
    if config.model_type not in MODEL_TYPES:
        return f"{config.model_type!r} is not of Llama's shape"
    if model.dtype != torch.bfloat16 or model.device.type != "cpu":
        return f"it is in {model.dtype} on {model.device.type}, not in bfloat16 on the CPU"
    if config.hidden_act not in ACTIVATIONS:
        return f"its activation is {config.hidden_act!r}"
    if getattr(config, "pretraining_tp", 1) != 1:
        return "its linears are sliced (pretraining_tp)"
    if block_size % KEYS_TOGETHER:
        return f"KV blocks of {block_size} positions are no multiples of {KEYS_TOGETHER}"
    odd = [width for width in _widths(config) if width % LANES]
    return f"widths {odd} are no multiples of {LANES}" if odd else None


def _widths(config: Any) -> tuple[int, ...]:
    head = head_width(config)
    heads = config.num_attention_heads * head, config.num_key_value_heads * head
    return (config.hidden_size, config.intermediate_size, head, *heads)


def head_width(config: Any) -> int:
    """Return how many columns of a projection are one head's."""
    width = getattr(config, "head_dim", None)
    return int(width or config.hidden_size // config.num_attention_heads)


@dataclass(slots=True)
class StepInput:
    """One step as the runner packs it.

    Attributes:
        embeds: [tokens, width] bfloat16; overwritten.
        positions: of each token.
        tables: for each token, where its row's blocks begin in `kv_blocks`.
        blocks: row blocks of the rows that use adapters.
        wanted: tokens whose logits are wanted.
    """

    embeds: Tensor
    positions: list[int]
    tables: list[int] = field(default_factory=list)
    kv_blocks: list[int] = field(default_factory=list)
    blocks: Sequence[RowBlock] = ()
    wanted: list[int] = field(default_factory=list)


class NativeStep:
    """The library with one base, its pool and its KV storage. Called by the engine thread alone."""

    def __init__(
        self,
        base: "BaseModel",
        pool: AdapterPool,
        storage: KvStorage,
        rules: Sequence[Rule],
        max_model_len: int,
    ) -> None:
        assert base.native is not None
        assert storage.block_size % KEYS_TOGETHER == 0
        assert all(rule.softcap is None for rule in rules)
        self._library = base.native
        self._rules = rules
        self._base = base
        self._storage = storage
        self._kinds = [kind_of(base, tail) for _, tail in ROLES]
        self._tables = _rotary_tables(base, max_model_len)
        self._layers = self._make_layers()
        self._model = self._make_model(pool)
        self._clock: Any = None
        self._last_merged: tuple[Callable[[], MergedCopy | None], Any] = (lambda: None, None)
        scratch = self._library.qc_new_scratch()
        if not scratch:
            raise MemoryError("not enough memory for the native library's buffers")
        self._scratch = ctypes.c_void_p(scratch)

    def __del__(self) -> None:
        """Free the library's buffers."""
        if hasattr(self, "_scratch"):
            self._library.qc_delete_scratch(self._scratch)

    def run(self, step: StepInput, merged: MergedCopy | None) -> tuple[Tensor, Tensor]:
        """Compute a step, on a merged copy if all its rows use that.

        Returns float32 logits [wanted, vocabulary] and what the head saw, [wanted, width].

        Raises: MemoryError.
        """
        num_wanted = len(step.wanted)
        hidden = step.embeds.new_empty(num_wanted, self._model.width)
        logits = torch.empty(num_wanted, self._model.vocabulary)
        layers = self._layers if merged is None else self._layers_of(merged)
        ints = [array("i", each) for each in (step.positions, step.tables, step.kv_blocks)]
        wanted = array("i", step.wanted)
        blocks, terms, num_terms = self._delta_tables(step.blocks)
        call = native.Step(
            num_tokens=step.embeds.shape[0],
            num_blocks=len(step.blocks),
            num_terms=num_terms,
            num_wanted=num_wanted,
            layers=ctypes.addressof(layers),
            head=self._head_of(merged),
            hidden=step.embeds.data_ptr(),
            positions=_address(ints[0]),
            tables=_address(ints[1]),
            kv_blocks=_address(ints[2]),
            blocks=ctypes.addressof(blocks),
            terms=ctypes.addressof(terms),
            wanted=_address(wanted),
            wanted_hidden=hidden.data_ptr(),
            logits=logits.data_ptr(),
            stage_seconds=None if self._clock is None else ctypes.addressof(self._clock),
        )
        if self._library.qc_run_step(self._model, call, self._scratch):
            raise MemoryError("not enough memory for a step's buffers")
        return logits, hidden

    def highest(self, logits: Tensor) -> tuple[list[float], list[int]]:
        """Return each row's highest number and where it is, as `sampler.FindHighest` says."""
        return native.highest_of_rows(self._library, logits)

    def start_clock(self) -> None:
        """Measure from now on how long each stage takes, from zero."""
        self._clock = (ctypes.c_double * len(STAGES))()

    def read_clock(self) -> dict[str, float]:
        """Return seconds per stage over all layers and steps since `start_clock`."""
        return dict(zip(STAGES, self._clock, strict=True))

    def _delta_tables(self, blocks: Sequence[RowBlock]) -> tuple[Any, Any, int]:
        """Return row blocks, and for each group the place of every term's rank rows."""
        num_terms = sum(len(block.terms) for block in blocks)
        rows = (native.RowBlock * max(len(blocks), 1))()
        terms = (native.Term * max(num_terms * native.NUM_GROUPS, 1))()
        first = 0
        for row, block in zip(rows, blocks, strict=False):
            row.start, row.end = block.start, block.end
            row.first_term, row.end_term = first, first + len(block.terms)
            for index, term in enumerate(block.terms, start=first):
                for group, kind in enumerate(self._kinds):
                    place = term.slot.ranges.get(kind)
                    if place is not None:
                        terms[group * num_terms + index] = native.Term(
                            place.start, place.num_rows, place.has_bias, term.weight
                        )
            first += len(block.terms)
        return rows, terms, num_terms

    def _make_layers(self) -> Any:
        layers = (native.Layer * self._base.num_layers)()
        for index, (layer, block) in enumerate(zip(layers, _blocks(self._base.model), strict=True)):
            attention = block.self_attn
            layer.attention_norm = _pointer(block.input_layernorm.weight)
            layer.feed_forward_norm = _pointer(block.post_attention_layernorm.weight)
            layer.query_norm = _norm_pointer(attention, "q_norm")
            layer.key_norm = _norm_pointer(attention, "k_norm")
            layer.keys = _pointer(self._storage.keys[index])
            layer.values = _pointer(self._storage.values[index])
            layer.window = self._rules[index].window or 0
            for kind, (name, _) in zip(self._kinds, ROLES, strict=True):
                group = self._base.groups[(kind, index)]
                setattr(layer, name, _linear(group.weight, group.bias))
        return layers

    def _layers_of(self, merged: MergedCopy) -> Any:
        """Return the layers with a merged copy's matrices in the base's place.

        Kept for the copy that ran last, which is not kept alive by that.
        """
        last, layers = self._last_merged
        if last() is not merged:
            layers = self._make_merged_layers(merged)
            self._last_merged = weakref.ref(merged), layers
        return layers

    def _make_merged_layers(self, merged: MergedCopy) -> Any:
        layers = type(self._layers).from_buffer_copy(self._layers)
        for kind, (name, _) in zip(self._kinds, ROLES, strict=True):
            for index, layer in enumerate(layers):
                key = (kind, index)
                if key in merged.weights:
                    bias = merged.biases.get(key, self._base.groups[key].bias)
                    setattr(layer, name, _linear(merged.weights[key], bias))
        return layers

    def _head_of(self, merged: MergedCopy | None) -> Any:
        head = self._base.head
        assert head is not None
        weight = merged.head if merged is not None and merged.head is not None else head.resident
        return _linear(weight, head.bias_tensor)

    def _make_model(self, pool: AdapterPool) -> Any:
        config = self._base.config
        cosines, sines = self._tables
        model = native.Model(
            num_layers=self._base.num_layers,
            width=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_width=head_width(config),
            intermediate=config.intermediate_size,
            vocabulary=self._base.vocab_size,
            block_size=self._storage.block_size,
            epsilon=config.rms_norm_eps,
            attention_scale=self._rules[0].scaling,
            activation=ACTIVATIONS[config.hidden_act],
            cosines=cosines.data_ptr(),
            sines=sines.data_ptr(),
            final_norm=_pointer(self._base.model.model.norm.weight),
        )
        for index, kind in enumerate(self._kinds):
            model.arenas[index] = _arena(pool, kind)
        return model


def _arena(pool: AdapterPool, kind: str) -> Any:
    arena = pool.arenas[kind]
    shape = arena.shape
    ends = [columns.stop for columns in shape.part_slices]
    return native.Arena(
        a=arena.lora_a.data_ptr(),
        b=arena.lora_b.data_ptr(),
        num_rows=arena.num_rows,
        num_parts=shape.num_parts,
        num_inputs=shape.in_features,
        num_outputs=shape.out_features,
        part_ends=(ctypes.c_int32 * native.MAX_PARTS)(*ends),
    )


def _blocks(model: Any) -> list[Any]:
    return list(model.model.layers)


def kind_of(base: "BaseModel", tail: str) -> str:
    """Return the kind of the group that holds a linear of the first block."""
    path = next(path for path in base.layout.places if path.endswith(f"layers.0.{tail}"))
    return base.layout.places[path].kind


def _rotary_tables(base: "BaseModel", num_positions: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [positions, head width / 2], as the model itself rounds them."""
    like = torch.empty(1, dtype=base.dtype)
    positions = torch.arange(num_positions)[None]
    cosines, sines = base.model.model.rotary_emb(like, positions)
    assert cosines.shape[-1] == head_width(base.config)
    half = cosines.shape[-1] // 2
    return cosines[0, :, :half].contiguous(), sines[0, :, :half].contiguous()


def _linear(weight: LinearWeight, bias: Tensor | None) -> native.Linear:
    assert isinstance(weight, NativeWeight | NativeInt8Weight)
    return weight.describe(bias)


def _norm_pointer(attention: nn.Module, name: str) -> int | None:
    norm = getattr(attention, name, None)
    return None if norm is None else _pointer(norm.weight)


def _pointer(tensor: Tensor) -> int:
    assert tensor.is_contiguous()
    assert tensor.dtype == torch.bfloat16
    return tensor.data_ptr()


def _address(values: "array[int]") -> int:
    return values.buffer_info()[0]
