"""The frozen base: a Hugging Face causal LM whose linears were replaced by projection groups.

Knows the model's modules, shapes and bytes. Does not know requests, KV blocks or the pool's state.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from quickchange_adapters.base_spec import BaseSpec, ModuleSpec
from quickchange_adapters.layers import GroupPart, Head, PlanHolder, ProjectionGroup
from quickchange_adapters.layout import AdapterLayout, GroupShape, Place
from quickchange_adapters.merge import MakeWeight
from quickchange_adapters.native.weight import NativeInt8Weight, NativeWeight, PackedMemory
from quickchange_adapters.ops.int8_weight import Int8Weight
from quickchange_adapters.ops.linear_weight import make_linear_weight
from torch import Tensor, nn

from quickchange_server.engine.attention import ATTENTION_NAME, register_attention
from quickchange_server.engine.native_choice import choose_native
from quickchange_server.engine.settings import EngineSettings
from quickchange_server.engine.unsupported import UnsupportedBase

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
SERVED_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_BLOCK_PATH = re.compile(r"^(.*?\.(?:layers|h|blocks)\.(\d+))\.(.+)$")


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear of a block before the replacement: weight [out, in], bias [out] or None."""

    path: str
    module: nn.Module
    is_conv1d: bool

    @property
    def weight(self) -> Tensor:
        """W as [out, in]."""
        weight: Tensor = self.module.weight.data  # type: ignore[union-attr, assignment]
        return weight.t().contiguous() if self.is_conv1d else weight

    @property
    def bias(self) -> Tensor | None:
        """Bias [out], if any."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.data

    @property
    def spec(self) -> ModuleSpec:
        """The linear as adapters see it."""
        out_features, in_features = self.weight.shape
        kind = "conv1d" if self.is_conv1d else "linear"
        return ModuleSpec(kind, in_features, out_features, self.bias is not None)  # type: ignore[arg-type]


class BaseModel:
    """The resident base, ready to compute packed rows.

    | attribute | meaning |
    |---|---|
    | model | the Hugging Face module after surgery; parameters frozen |
    | holder | the step's plan, read by every projection group |
    | layout | groups and places of all linears an adapter may target |
    | spec | names and shapes, for the checks |
    | native | the native library, if it computes this base's steps and holds its weights |
    | native_refusal | why it does not, else None |
    | amx_refusal | why its products are not computed by AMX, else None |
    """

    def __init__(self, model: Any, settings: EngineSettings) -> None:
        self.model = model
        self.config = model.config.get_text_config()
        self.dtype: torch.dtype = model.dtype
        self.device = torch.device(settings.device)
        choice = choose_native(model, settings)
        self.native, self.native_refusal = choice.library, choice.refusal
        self.amx_refusal = choice.amx_refusal
        self._make_weight = self._base_weight_maker(settings)
        self.holder = PlanHolder()
        self.groups: dict[tuple[str, int], ProjectionGroup] = {}
        specs: dict[str, ModuleSpec] = {}
        self.head: Head | None = None
        self._groups_by_module: dict[str, tuple[ProjectionGroup, slice]] = {}
        head_path = self._replace_head(specs)
        self.layout = replace(
            self._replace_linears(specs), head=head_path, embedding=self._embedding_path(specs)
        )
        self.num_layers = int(self.config.num_hidden_layers)
        self.digest = self.checksum()
        self.spec = BaseSpec(
            settings.served_name,
            self.digest,
            self.config.model_type,
            self.num_layers,
            specs,
            settings.known_as,
        )

    @property
    def num_bytes(self) -> int:
        """Resident bytes of the base: groups, head, and what stayed in the module."""
        rest = {t.data_ptr(): t.nbytes for _, t in self._plain_tensors()}
        packed = sum(group.weight.num_bytes for group in self.groups.values())
        packed += sum(g.bias.nbytes for g in self.groups.values() if g.bias is not None)
        head = self.head.resident.num_bytes if self.head is not None else 0
        return sum(rest.values()) + packed + head

    @property
    def max_model_len(self) -> int:
        """Most positions that the checkpoint was made for."""
        return int(self.config.max_position_embeddings)

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return int(self.config.vocab_size)

    def dense(self, kind: str, layer: int) -> Tensor:
        """Return a group's exact fused matrix [out, in]."""
        return self.groups[(kind, layer)].weight.dense()

    def bias(self, kind: str, layer: int) -> Tensor | None:
        """Return a group's fused bias [out], if it has one."""
        return self.groups[(kind, layer)].bias

    def dense_head(self) -> Tensor:
        """Return the exact head [vocabulary, width]."""
        assert self.head is not None
        return self.head.resident.dense()

    def bias_of(self, module: str) -> Tensor | None:
        """Return one linear's own bias [out], by its module path."""
        group, columns = self._groups_by_module[module]
        return None if group.bias is None else group.bias[columns]

    def embed(self, token_ids: Tensor) -> Tensor:
        """Look up token ids [tokens] -> [tokens, width]."""
        result: Tensor = self.model.get_input_embeddings()(token_ids)
        return result

    def weight_maker(self) -> MakeWeight:
        """Return what makes matrices [out, in] resident in the form that this base's steps read.

        Native ones that one maker made share memory, which is free when all are gone.
        """
        library, memory = self.native, PackedMemory()
        if library is None:
            return make_linear_weight
        return lambda weight: NativeWeight(weight, library, memory)

    def _base_weight_maker(self, settings: EngineSettings) -> MakeWeight:
        """Return what makes the base's own matrices resident, quantised if that was asked for."""
        library, memory = self.native, PackedMemory()
        if settings.quantize is None:
            return self.weight_maker()
        if self.dtype == torch.float32:
            raise UnsupportedBase("--quantize int8 serves bfloat16 and float16, not float32")
        if library is None:
            return Int8Weight
        return lambda weight: NativeInt8Weight(weight, library, memory)

    def checksum(self) -> str:
        """Compute sha256 over every resident base weight, in a fixed order (hex)."""
        digest = hashlib.sha256()
        for name, tensor in self._all_weights():
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
            flat = tensor.detach().cpu().reshape(-1).contiguous()
            digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _all_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._plain_tensors()
        for (kind, layer), group in sorted(self.groups.items()):
            yield f"{kind}.{layer}", group.weight.dense()
            if group.bias is not None:
                yield f"{kind}.{layer}.bias", group.bias
        if self.head is not None:
            yield "head", self.head.resident.dense()
            if self.head.bias_tensor is not None:
                yield "head.bias", self.head.bias_tensor

    def _plain_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from sorted(self.model.named_parameters())
        kept = self.model.state_dict().keys()
        yield from sorted((n, b) for n, b in self.model.named_buffers() if n in kept)

    def _replace_linears(self, specs: dict[str, ModuleSpec]) -> AdapterLayout:
        families: dict[str, list[list[Linear]]] = {}
        for linears in _sibling_groups(block_linears(self.model)):
            families.setdefault(_kind_of(linears), []).append(linears)
            specs.update({linear.path: linear.spec for linear in linears})
        shapes, places = {}, {}
        for kind, groups in families.items():
            parts = [linear.spec for linear in groups[0]]
            widths = tuple(part.out_features for part in parts)
            shapes[kind] = GroupShape(kind, parts[0].in_features, widths, len(groups))
            for layer in range(len(groups)):
                linears, groups[layer] = groups[layer], []  # two copies of one group, not of all
                self._install(shapes[kind], layer, linears)
                for part, linear in enumerate(linears):
                    places[linear.path] = Place(kind, layer, part)
        return AdapterLayout(shapes, places)

    def _install(self, shape: GroupShape, layer: int, linears: list[Linear]) -> None:
        weight = self._make_weight(torch.cat([linear.weight for linear in linears]))
        bias = _fused_bias(linears)
        group = ProjectionGroup(shape, layer, weight, bias, self.holder)
        self.groups[(shape.kind, layer)] = group
        for index, linear in enumerate(linears):
            self._groups_by_module[linear.path] = (group, shape.part_slices[index])
            _set_module(self.model, linear.path, GroupPart(group, index))

    def _replace_head(self, specs: dict[str, ModuleSpec]) -> str | None:
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            return None
        path = path_of(self.model, head)
        specs[path] = ModuleSpec(
            "lm_head",
            head.in_features,
            head.out_features,
            head.bias is not None,
            values_sha256(head.weight.data),
        )
        bias = None if head.bias is None else head.bias.data
        self.head = Head(self._make_weight(head.weight.data), bias, self.holder)
        _set_module(self.model, path, self.head)
        return path

    def _embedding_path(self, specs: dict[str, ModuleSpec]) -> str | None:
        """Find the embedding; one that scales its output is not offered to adapters."""
        embedding = self.model.get_input_embeddings()
        if type(embedding) is not nn.Embedding:
            return None
        path = path_of(self.model, embedding)
        specs[path] = ModuleSpec(
            "embedding",
            embedding.num_embeddings,
            embedding.embedding_dim,
            values_sha256=values_sha256(embedding.weight.data),
        )
        return path


def load_base(folder: Path, settings: EngineSettings) -> BaseModel:
    """Load a Hugging Face folder and make it ready to serve.

    Raises: UnsupportedBase if the folder is no causal LM that this engine can run.
    """
    from transformers import AutoModelForCausalLM

    register_attention()
    dtype: Any = "auto" if settings.dtype == "auto" else getattr(torch, settings.dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, attn_implementation=ATTENTION_NAME, local_files_only=True
        )
    except Exception as error:  # any of the families' own ways of saying no
        reason = f"{type(error).__name__}: {error}"
        raise UnsupportedBase(f"cannot load {str(folder)!r}: {reason}") from error
    model.eval().requires_grad_(False)
    model.to(settings.device)
    _leave_file(model)
    base = BaseModel(model, settings)
    if base.device.type == "cuda":
        torch.cuda.empty_cache()  # what the linears had before they were put together
    return base


def _leave_file(model: Any) -> None:
    """Copy what is not packed later, in place: one view would keep the whole file in memory."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dim() == 1 or isinstance(module, nn.Embedding):
                parameter.data = parameter.data.clone()


def end_token_ids(model: Any) -> frozenset[int]:
    """Collect the ids that end a text, from the generation config and the model's config."""
    ids: set[int] = set()
    for config in (model.generation_config, model.config):
        value = getattr(config, "eos_token_id", None)
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(ids)


def check_config(folder: Path) -> None:
    """Refuse what the config alone shows cannot be served. Raises: UnsupportedBase."""
    path = folder / "config.json"
    if not path.is_file():
        raise UnsupportedBase(f"{str(folder)!r} holds no config.json: not a Hugging Face model")
    config = json.loads(path.read_text())
    config = config.get("text_config", config)
    unknown = set(config.get("layer_types") or ()) - SERVED_LAYER_TYPES
    if unknown:
        raise UnsupportedBase(
            f"{config.get('model_type')!r} has layers of type {', '.join(sorted(unknown))}; "
            f"served are {', '.join(sorted(SERVED_LAYER_TYPES))}"
        )
    if config.get("quantization_config"):
        raise UnsupportedBase(
            "this checkpoint is quantised; serve the unquantised weights in bfloat16"
        )


def block_linears(model: nn.Module) -> list[Linear]:
    """Return the linears of the numbered blocks. Raises: UnsupportedBase when there are none."""
    from transformers.pytorch_utils import Conv1D

    found = []
    for path, module in model.named_modules():
        if _BLOCK_PATH.match(path) and isinstance(module, (nn.Linear, Conv1D)):
            found.append(Linear(path, module, isinstance(module, Conv1D)))
    if not found:
        raise UnsupportedBase("no linears found in numbered blocks: this model cannot be served")
    return found


def _sibling_groups(linears: list[Linear]) -> Iterator[list[Linear]]:
    by_path = {linear.path: linear for linear in linears}
    done: set[str] = set()
    for linear in linears:
        if linear.path in done:
            continue
        group = [by_path[path] for path in _sibling_paths(linear.path, by_path)]
        done.update(member.path for member in group)
        yield group


def _sibling_paths(path: str, by_path: dict[str, Linear]) -> list[str]:
    parent, _, name = path.rpartition(".")
    for names in SIBLINGS:
        paths = [f"{parent}.{sibling}" for sibling in names]
        if name in names and all(p in by_path for p in paths):
            inputs = {by_path[p].spec.in_features for p in paths}
            biases = {by_path[p].bias is None for p in paths}
            if len(inputs) == 1 and len(biases) == 1:
                return paths
    return [path]


def _kind_of(linears: list[Linear]) -> str:
    match = _BLOCK_PATH.match(linears[0].path)
    assert match is not None
    tail = "+".join([match[3], *(linear.path.rpartition(".")[2] for linear in linears[1:])])
    shapes = "x".join(str(linear.spec.out_features) for linear in linears)
    return f"{tail}[{linears[0].spec.in_features}:{shapes}]"


def _fused_bias(linears: list[Linear]) -> Tensor | None:
    if linears[0].bias is None:
        return None
    return torch.cat([linear.bias for linear in linears if linear.bias is not None])


def values_sha256(weight: Tensor) -> str:
    """Digest of a weight's values as float32, as `tensor_values` takes it of a file."""
    values = weight.detach().cpu().float().contiguous()
    return hashlib.sha256(values.view(torch.uint8).numpy().data).hexdigest()


def path_of(model: nn.Module, wanted: nn.Module) -> str:
    """Return where in a model a module is."""
    found: str = next(name for name, module in model.named_modules() if module is wanted)
    return found


def _set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, name, module)
