from pathlib import Path

import pytest
from quickchange_server.errors import InvalidRequest
from quickchange_server.tokenizer import MAX_INLINE_CHARS, Tokenizer


def test_text_comes_back(tokenizer: Tokenizer) -> None:
    text = "naïve café — 你好 🙂 the lazy dog"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_token_bytes_joined_are_the_text(tokenizer: Tokenizer) -> None:
    text = "a base stays 🙂 resident"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()


def test_every_byte_has_a_token(tokenizer: Tokenizer) -> None:
    assert {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)} >= {
        bytes([byte]) for byte in range(256)
    }


def test_id_outside_the_vocabulary_is_empty(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(10_000) == b""


def test_specials_are_hidden_unless_asked_for(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>user")
    assert tokenizer.decode(ids) == "user"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>user"


def test_chat_template_is_the_base_s_own(tokenizer: Tokenizer) -> None:
    text = tokenizer.render_chat([{"role": "user", "content": "hi"}])
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


async def test_chat_ids_equal_those_of_the_wrapper(tokenizer: Tokenizer, tiny_base: Path) -> None:
    from transformers import AutoTokenizer

    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "你好"}]
    plain = AutoTokenizer.from_pretrained(str(tiny_base))
    expected = plain.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert await tokenizer.encode_chat(messages) == expected


async def test_long_text_gives_the_same_ids_off_the_loop(tokenizer: Tokenizer) -> None:
    text = "the quick brown fox " * (MAX_INLINE_CHARS // 10)
    assert await tokenizer.encode_async(text) == tokenizer.encode(text)


def test_missing_template_is_a_clear_error(tiny_base: Path) -> None:
    tokenizer = Tokenizer.load(tiny_base)
    tokenizer._pretrained.chat_template = None
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenizer.render_chat([{"role": "user", "content": "hi"}])


def test_template_that_refuses_is_the_caller_s_error(tiny_base: Path) -> None:
    tokenizer = Tokenizer.load(tiny_base)
    tokenizer._pretrained.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        tokenizer.render_chat([{"role": "user", "content": "hi"}])


async def test_many_texts_give_the_ids_of_each(tokenizer: Tokenizer) -> None:
    texts = ["the fox", "", "naïve 🙂", "lazy " * MAX_INLINE_CHARS]
    expected = [tokenizer.encode(text) for text in texts]
    assert await tokenizer.encode_many_async(texts) == expected
