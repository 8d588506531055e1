"""Uploads that must be refused, each with its status and code; all made here, none stored."""

import gzip
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.adapters.adapter_files import (
    Array,
    config_values,
    q_pairs,
    safetensors_bytes,
    weights_bytes,
)
from tests.server.upload_forms import (
    BOUNDARY,
    END,
    GOOD_CONFIG,
    GOOD_WEIGHTS,
    KIND,
    Q0,
    Q1,
    SPEC,
    configured,
    entry,
    form,
    headed,
    holding,
    of_width,
    ones,
    part,
    renamed,
    renamed_pairs,
    tarred,
    weighing,
    zipped,
)


@dataclass(frozen=True, slots=True)
class BadUpload:
    """A body and what the server has to say to it."""

    name: str
    status: int
    code: str
    body: bytes
    kind: str = KIND


NOT_SAFETENSORS = {
    "pickle": pickle.dumps({"a": [1.0]}),
    "old pickle": b"\x80\x02}q\x00.",
    "torch zip": zipped(),
    "tar": tarred(),
    "gzip": gzip.compress(GOOD_WEIGHTS[:999]),
    "gguf": b"GGUF\x03\x00\x00\x00" + bytes(64),
    "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(64),
    "numpy": b"\x93NUMPY\x01\x00" + bytes(64),
    "lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64,
    "error page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "json error": b'{"error": "Repository not found"}',
    "png": b"\x89PNG\r\n\x1a\n" + bytes(64),
    "empty": b"",
    "zeros": bytes(4096),
    "noise": bytes(range(256)) * 16,
    "cut in the length": GOOD_WEIGHTS[:5],
    "cut behind the length": GOOD_WEIGHTS[:8],
}
HEADER_END = 8 + int.from_bytes(GOOD_WEIGHTS[:8], "little")
BROKEN_FILES = {
    "cut in the header": GOOD_WEIGHTS[:40],
    "cut behind the header": GOOD_WEIGHTS[:HEADER_END],
    "cut in a tensor": GOOD_WEIGHTS[:-3],
    "bytes behind the end": GOOD_WEIGHTS + b"x",
    "length zero": bytes(8) + GOOD_WEIGHTS[8:],
    "length one": b"\x01" + bytes(7) + GOOD_WEIGHTS[8:],
    "length beyond the file": (1 << 19).to_bytes(8, "little") + GOOD_WEIGHTS[8:],
    "length beyond all": b"\xff" * 8 + GOOD_WEIGHTS[8:],
    "header not utf-8": safetensors_bytes('{"a": 1}')[:10] + b"\xff\xff" + b"x" * 99,
}
BOMB = {f"t{n}": entry(shape=[0], offsets=[0, 0]) for n in range(200_000)}
BAD_HEADERS: dict[str, tuple[object, bytes]] = {
    "overlap": ({"a": entry(), "b": entry(offsets=(8, 24))}, bytes(24)),
    "hole": ({"a": entry(), "b": entry(offsets=(20, 36))}, bytes(36)),
    "offset beyond 64 bits": ({"a": entry(offsets=(0, 1 << 70))}, bytes(16)),
    "shape that overflows": ({"a": entry(shape=(1 << 62, 1 << 62))}, bytes(16)),
    "negative offset": ({"a": entry(offsets=(-16, 0))}, bytes(16)),
    "end before begin": ({"a": entry(offsets=(16, 0))}, bytes(16)),
    "three offsets": ({"a": entry(offsets=(0, 8, 16))}, bytes(16)),
    "offset is a number in text": ({"a": entry(offsets=("0", "16"))}, bytes(16)),
    "shape is a float": ({"a": entry(shape=(4.0,))}, bytes(16)),
    "shape is true": ({"a": entry(shape=(True,), offsets=(0, 4))}, bytes(4)),
    "shape of a hundred sides": ({"a": entry(shape=(1,) * 100, offsets=(0, 4))}, bytes(4)),
    "entry is null": ({"a": None}, b""),
    "entry with a surplus key": ({"a": {**entry(), "more": 1}}, bytes(16)),
    "entry without a shape": ({"a": {"dtype": "F32", "data_offsets": [0, 16]}}, bytes(16)),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b""),
    "no tensors": ({}, b""),
    "float64": ({"a": entry("F64", offsets=(0, 32))}, bytes(32)),
    "int8": ({"a": entry("I8", offsets=(0, 4))}, bytes(4)),
    "float8": ({"a": entry("F8_E4M3", offsets=(0, 4))}, bytes(4)),
    "bool": ({"a": entry("BOOL", offsets=(0, 4))}, bytes(4)),
    "dtype of a megabyte": ({"a": entry("F" * 900_000)}, bytes(16)),
    "key twice": ('{"a": {}, "a": {}}', b""),
    "nan": ('{"a": NaN}', b""),
    "number of 5000 digits": ('{"a": ' + "9" * 5000 + "}", b""),
    "deep": ('{"a":' * 100_000, b""),
    "deep lists": ('{"a":' + "[" * 400_000, b""),
    "half a surrogate": ('{"\\ud800": {}}', b""),
    "bomb": (BOMB, b""),
    "bomb under the limit": (dict(list(BOMB.items())[:12_000]), b""),
}

TENSORS: dict[str, tuple[str, bytes]] = {
    "nan": ("not_finite", holding(np.nan)),
    "infinity in B": ("not_finite", holding(-np.inf, f"{Q0}.lora_B.weight")),
    "nan in float16": ("not_finite", holding(np.nan, dtype=np.float16)),
    "nan in bfloat16": ("not_finite", holding(0x7FC0, dtype=np.uint16)),
    "alpha that overflows": ("not_finite", configured(lora_alpha=1e39)),
    "zero update": (
        "no_effect",
        weighing({f"{q}.lora_B.weight": ones(64, 4) * 0 for q in (Q0, Q1)}),
    ),
    "A alone": ("weights_invalid", weighing({f"{Q0}.lora_B.weight": None})),
    "B alone": ("weights_invalid", weighing({f"{Q1}.lora_A.weight": None})),
    "1-D": ("shape_mismatch", weighing({f"{Q0}.lora_A.weight": ones(256)})),
    "3-D": ("shape_mismatch", weighing({f"{Q0}.lora_A.weight": ones(4, 64, 1)})),
    "0-D": ("shape_mismatch", weighing({f"{Q0}.lora_A.weight": ones()})),
    "no values": ("shape_mismatch", weighing({f"{Q0}.lora_A.weight": ones(0, 64)})),
    "A transposed": ("shape_mismatch", weighing({f"{Q0}.lora_A.weight": ones(64, 4)})),
    "B transposed": ("shape_mismatch", weighing({f"{Q0}.lora_B.weight": ones(4, 64)})),
    "smaller base": ("shape_mismatch", of_width(32)),
    "larger base": ("shape_mismatch", of_width(4096)),
    "rank other than r": ("shape_mismatch", configured(r=8)),
    "rank of 300": (
        "rank_too_large",
        form(json.dumps(config_values(r=300)).encode(), weights_bytes(q_pairs(SPEC, 300))),
    ),
    "one layer more": (
        "unknown_module",
        weighing(renamed_pairs(lambda name: name.replace("layers.1", "layers.97"))),
    ),
    "other layers": (
        "config_invalid",
        renamed(lambda name: name.replace("layers.1", "layers.97")),
    ),
    "module not in the base": (
        "config_invalid",
        renamed(lambda name: name.replace("q_proj", "qkv_proj")),
    ),
    "no prefix": ("weights_invalid", renamed(lambda name: name.removeprefix("base_model.model."))),
    "prefix twice": ("config_invalid", renamed(lambda name: "base_model.model." + name)),
    "adapter's name inside": (
        "weights_invalid",
        renamed(lambda name: name.replace(".weight", ".default.weight")),
    ),
    "path as a tensor's name": ("weights_invalid", weighing({"../../etc/passwd": ones(1)})),
    "nul in a tensor's name": ("weights_invalid", weighing({"a\0b": ones(1)})),
    "tensor's name in other letters": ("weights_invalid", weighing({"аррlе": ones(1)})),
    "tensor's name of 64 KiB": ("weights_invalid", weighing({"a" * 65_536: ones(1)})),
    "module's path of 64 KiB": (
        "unknown_module",
        weighing({f"base_model.model.{'a.' * 32_768}x.lora_A.weight": ones(4, 64)}),
    ),
    "magnitude of DoRA": (
        "config_unsupported",
        weighing({f"{Q0}.lora_magnitude_vector": ones(64)}, use_dora=True),
    ),
    "base's own weight": (
        "config_unsupported",
        weighing({f"{Q0}.base_layer.weight": ones(64, 64)}),
    ),
    "bias of a norm": (
        "config_unsupported",
        weighing({"base_model.model.model.norm.bias": ones(64)}),
    ),
    "bias that is not announced": ("config_invalid", weighing({f"{Q0}.lora_B.bias": ones(64)})),
}

UNSUPPORTED: dict[str, Mapping[str, Any]] = {
    **{f"init {name}": {"init_lora_weights": name} for name in (
        "pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq", "tomorrow",
    )},
    **{f"type {name}": {"peft_type": name} for name in (
        "VERA", "ADALORA", "IA3", "PROMPT_TUNING", "PREFIX_TUNING", "LOHA", "OFT", "XLORA",
    )},
    "DoRA": {"use_dora": True},
    "modules to save": {"modules_to_save": ["lm_head"]},
    "replicated layers": {"layer_replication": [[0, 2], [1, 2]]},
    "trained tokens": {"trainable_token_indices": [1, 2]},
    "bare parameters": {"target_parameters": ["mlp.experts.gate_up_proj"]},
    "activated LoRA": {"alora_invocation_tokens": [1]},
    "megatron": {"megatron_config": {"a": 1}},
    "KaSA": {"kasa_config": {"beta": 0.1}},
    "field of tomorrow": {"of_tomorrow": {"deep": [1]}},
    "look-ahead": {"target_modules": r"^(?!.*vision).*q_proj$"},
    "back-reference": {"target_modules": r"(q)_proj\1"},
}  # fmt: skip

INVALID_CONFIGS: dict[str, Mapping[str, Any]] = {
    "r 0": {"r": 0},
    "r -1": {"r": -1},
    "r of 10^400": {"r": 10**400},
    "r 1.5": {"r": 1.5},
    "r true": {"r": True},
    "r in text": {"r": "4"},
    "alpha in text": {"lora_alpha": "8"},
    "alpha beyond floats": {"lora_alpha": 10**400},
    "bias of another kind": {"bias": "some"},
    "no targets": {"target_modules": []},
    "targets of numbers": {"target_modules": [1]},
    "5000 targets": {"target_modules": [f"m{n}" for n in range(5000)]},
    "targets that are not there": {"target_modules": ["c_attn"]},
    "targets without tensors": {"target_modules": ["q_proj", "k_proj"]},
    "evil targets": {"target_modules": r"([a-z_.0-9]+)+X"},
    "evil repetition": {"target_modules": r"((.{1,999}){1,999}){1,999}q_proj"},
    "evil alternatives": {"target_modules": "(" + "|".join(["(a|a)*"] * 120) + ")*b"},
    "targets of 2 KiB": {"target_modules": "q" * 2048},
    "half a pattern": {"target_modules": "(q_proj"},
    "evil exclusion": {"exclude_modules": r"(.*)*q_proj"},
    "evil rank patterns": {"rank_pattern": {f"(.|b){{1,200}}{n}": 4 for n in range(200)}},
    "evil alpha pattern": {"alpha_pattern": {r"(x{1,500}){1,500}": 4}},
    "2000 rank patterns": {"rank_pattern": {f"m{n}": 4 for n in range(2000)}},
    "rank pattern of 0": {"rank_pattern": {"q_proj": 0}},
    "layers of text": {"layers_to_transform": "all"},
    "no type": {"peft_type": None},
}

JSON_FAULTS = {
    "empty": b"",
    "list": b"[]",
    "null": b"null",
    "text": b'"LORA"',
    "half": GOOD_CONFIG[:-5],
    "bom": b"\xef\xbb\xbf" + GOOD_CONFIG,
    "utf-16": GOOD_CONFIG.decode().encode("utf-16"),
    "not utf-8": GOOD_CONFIG.replace(b"tiny", b"\xff\xff"),
    "key twice": b'{"r": 8, "r": 4}',
    "key twice inside": b'{"rank_pattern": {"q": 1, "q": 2}}',
    "nan": GOOD_CONFIG.replace(b'"lora_alpha": 8', b'"lora_alpha": NaN'),
    "infinity": GOOD_CONFIG.replace(b'"lora_alpha": 8', b'"lora_alpha": -Infinity'),
    "1e999": GOOD_CONFIG.replace(b'"lora_alpha": 8', b'"lora_alpha": 1e999'),
    "5000 digits": b'{"r": ' + b"9" * 5000 + b"}",
    "half a surrogate": b'{"target_modules": "\\ud800"}',
    "deep": b'{"a":' * 40_000,
    "deep lists": b"[" * 200_000,
    "pickle": pickle.dumps({}),
    "yaml": b"r: 4\nlora_alpha: 8\n",
}
BAD_NAMES = {
    "missing": "",
    "path": "../../etc/passwd",
    "slash": "a/b",
    "upper case": "Legal",
    "dot at the end": "legal.",
    "64 letters": "a" * 64,
    "nul": "a\0b",
    "other letters": "lеgal",
    "line": "a\nb",
    "selector": "legal@canary",
}

_GOOD_PARTS = part("adapter_config", GOOD_CONFIG) + part("adapter_model", GOOD_WEIGHTS)
FORMS: dict[str, tuple[int, str, bytes]] = {
    "empty body": (400, "invalid_form", b""),
    "no parts": (400, "invalid_name", END),
    "not a form": (400, "invalid_form", b"nonsense" * 99),
    "cut in a part": (400, "invalid_form", form()[: len(form()) // 2]),
    "cut before the end": (400, "invalid_form", form()[:-4]),
    "files alone": (400, "invalid_name", _GOOD_PARTS + END),
    "config missing": (
        400, "config_invalid", part("name", b"a") + part("adapter_model", GOOD_WEIGHTS) + END,
    ),
    "weights missing": (
        400, "weights_invalid", part("name", b"a") + part("adapter_config", GOOD_CONFIG) + END,
    ),
    "name twice": (400, "invalid_request", part("name", b"a") + form()),
    "weights twice": (400, "invalid_request", part("adapter_model", GOOD_WEIGHTS) + form()),
    "unknown part": (400, "unknown_field", part("chat_template", b"{{ evil }}") + form()),
    "part without a name": (
        400, "invalid_form", f"--{BOUNDARY}\r\nX-Other: 1\r\n\r\nx\r\n".encode() + form(),
    ),
    "99 parts": (400, "invalid_form", b"".join(part(f"p{n}", b"") for n in range(99)) + END),
    "part's header of 1 MiB": (
        400, "invalid_form", part("name", b"a", f"X: {'x' * (1 << 20)}\r\n") + _GOOD_PARTS + END,
    ),
    "1000 headers of a part": (
        400, "invalid_form", part("name", b"a", "X-Many: 1\r\n" * 1000) + _GOOD_PARTS + END,
    ),
    "name of 5000 letters": (413, "too_large", form(name="a" * 5000)),
    "config of 300 KiB": (413, "too_large", form(config=GOOD_CONFIG + b" " * 300_000)),
    "task of 20 kB": (413, "too_large", form(task=b" " * 20_000)),
    "task that is no json": (400, "task_invalid", form(task=b"{")),
    "task that is a list": (400, "task_invalid", form(task=b"[]")),
    "alias sha256": (400, "invalid_name", form(alias=b"sha256")),
    "alias in upper case": (400, "invalid_name", form(alias=b"Canary")),
    "alias not utf-8": (400, "invalid_request", form(alias=b"\xff\xfe")),
    "switch that is neither": (400, "invalid_request", form(allow_noop=b"maybe")),
    "visibility of another kind": (400, "config_invalid", form(visibility=b"friends")),
    "40 tags": (400, "invalid_request", form(tags=b",".join(b"%d" % n for n in range(40)))),
    "the base's name": (409, "conflict", form(name="tiny")),
    "another base, strictly": (
        400, "base_mismatch",
        form(
            config=GOOD_CONFIG.replace(b"/somewhere/tiny", b"/somewhere/else"), strict_base=b"true"
        ),
    ),
}  # fmt: skip
OTHER_KINDS = {
    "json": ("application/json", GOOD_CONFIG),
    "no kind": ("", form()),
    "no boundary": ("multipart/form-data", form()),
    "octets": ("application/octet-stream", GOOD_WEIGHTS),
    "mixed": (f"multipart/mixed; boundary={BOUNDARY}", form()),
}


def bad_uploads() -> list[BadUpload]:
    """Return the corpus."""
    found = [
        *(BadUpload(f"weights: {n}", 400, "weights_not_safetensors", form(weights=data))
          for n, data in NOT_SAFETENSORS.items()),
        *(BadUpload(f"weights: {n}", 400, "weights_invalid", form(weights=data))
          for n, data in BROKEN_FILES.items()),
        *(BadUpload(f"header: {n}", 400, "weights_invalid", headed(*made))
          for n, made in BAD_HEADERS.items()),
        *(BadUpload(f"tensors: {n}", 400, code, body) for n, (code, body) in TENSORS.items()),
        *(BadUpload(f"config: {n}", 400, "config_unsupported", configured(**changes))
          for n, changes in UNSUPPORTED.items()),
        *(BadUpload(f"config: {n}", 400, "config_invalid", configured(**changes))
          for n, changes in INVALID_CONFIGS.items()),
        BadUpload("config: r of 10^9", 400, "rank_too_large", configured(r=10**9)),
        *(BadUpload(f"json: {n}", 400, "config_invalid", form(config=data))
          for n, data in JSON_FAULTS.items()),
        *(BadUpload(f"name: {n}", 400, "invalid_name", form(name=name))
          for n, name in BAD_NAMES.items()),
        *(BadUpload(f"form: {n}", *made) for n, made in FORMS.items()),
        *(BadUpload(f"kind: {n}", 415, "unsupported_media_type", body, kind)
          for n, (kind, body) in OTHER_KINDS.items()),
        BadUpload("form: boundary of 500 letters", 400, "invalid_form", form(), KIND + "x" * 500),
    ]  # fmt: skip
    assert len({each.name for each in found}) == len(found)
    return found


def combined_faults() -> tuple[bytes, set[tuple[str, str]]]:
    """Return one form with a fault in every corner, and all that must be said of it."""
    tensors: dict[str, Array] = {**_good_pairs(), f"{Q1}.lora_A.weight": ones(4, 63)}
    tensors[f"{Q0}.lora_A.weight"][0, 0] = np.nan
    tensors["../x"] = ones(1)
    config = config_values(use_dora=True, bias="some", init_lora_weights="pissa", r=0)
    body = form(
        json.dumps(config).encode(),
        weights_bytes(tensors),
        name="No Name",
        alias=b"sha256",
        allow_noop=b"perhaps",
        surprise=b"!",
    )
    return body, {
        ("invalid_name", "name"),
        ("invalid_name", "alias"),
        ("invalid_request", "allow_noop"),
        ("unknown_field", "surprise"),
        ("config_unsupported", "use_dora"),
        ("config_unsupported", "init_lora_weights"),
        ("config_invalid", "bias"),
        ("config_invalid", "r"),
        ("weights_invalid", "../x"),
        ("shape_mismatch", f"{Q1}.lora_A.weight"),
        ("not_finite", f"{Q0}.lora_A.weight"),
    }


def _good_pairs() -> dict[str, Array]:
    """Return good pairs that a test may spoil."""
    return {name: array.copy() for name, array in q_pairs(SPEC).items()}
