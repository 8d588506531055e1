"""Examples as token ids: what cannot become any is named by its line."""

from pathlib import Path

import pytest
from quickchange_adapters.errors import DataInvalid
from quickchange_adapters.task import Task
from quickchange_adapters.training.examples import Example
from quickchange_adapters.training.prompt_form import PromptForm, token_rows
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast


def test_an_input_whose_characters_the_base_does_not_know_is_named() -> None:
    known = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    form = PromptForm(PreTrainedTokenizerFast(tokenizer_object=known), Task(), "completion", (1,))
    good, bad = (Example(text, "b", Path("rows.csv"), 7, {}) for text in ("ab", "\u03a9"))
    assert [row.prompt_ids for row in token_rows([good], form, 99)] == [(0, 1)]
    with pytest.raises(DataInvalid, match=r"rows\.csv, line 7: the input has no tokens"):
        token_rows([good, bad], form, 99)
