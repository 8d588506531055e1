"""How a base becomes resident."""

import weakref
from pathlib import Path

from quickchange_server.engine.attention import ATTENTION_NAME, register_attention
from quickchange_server.engine.base_model import BaseModel, block_linears
from quickchange_server.engine.settings import EngineSettings
from torch import nn
from transformers import AutoModelForCausalLM


def test_linears_go_one_by_one_as_they_are_put_together(tiny_base: Path) -> None:
    """Else a device would have to hold the base twice while it is loaded."""
    register_attention()
    model = AutoModelForCausalLM.from_pretrained(str(tiny_base), attn_implementation=ATTENTION_NAME)
    linears = block_linears(model)
    last = linears[-1].path
    were_early: list[bool] = []

    def note() -> None:
        were_early.append(isinstance(model.get_submodule(last), nn.Linear))

    weakref.finalize(linears[0].module, note)
    del linears
    BaseModel(model, EngineSettings(dtype="float32"))
    assert were_early == [True]
