import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quickchange_server.detokenizer import Detokenizer, WindowDetokenizer
from quickchange_server.tokenizer import Tokenizer

TEXTS = st.text(
    alphabet=st.one_of(
        st.sampled_from("the quick 你好世界 🙂👩‍👩‍👧 é—\n\u200d\ufffd"),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=40,
)


def parts_of(detokenizer: Detokenizer, token_ids: list[int]) -> list[str]:
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


def window(tokenizer: Tokenizer) -> WindowDetokenizer:
    return WindowDetokenizer(
        lambda ids: tokenizer.decode(ids, skip_special_tokens=False), tokenizer.special_ids
    )


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_parts_of_any_tokens_join_to_one_decode(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    assert "".join(parts_of(tokenizer.detokenizer(), ids)) == tokenizer.decode(ids)
    assert "".join(parts_of(window(tokenizer), ids)) == tokenizer.decode(ids)


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_text_never_shows_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    clean = text.replace("\ufffd", "")
    for detokenizer in (tokenizer.detokenizer(), window(tokenizer)):
        parts = parts_of(detokenizer, tokenizer.encode(clean))
        assert "".join(parts) == clean
        assert not any("\ufffd" in part for part in parts)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_pieces_join_to_one_decode(piece_tokenizer: Tokenizer, data: st.DataObject) -> None:
    specials, others = st.integers(0, 2), st.integers(259, piece_tokenizer.vocab_size - 1)
    ids = data.draw(st.lists(st.one_of(specials, others), max_size=30))
    parts = parts_of(piece_tokenizer.detokenizer(), ids)
    assert "".join(parts) == piece_tokenizer.decode(ids)


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_pieces_never_show_half_a_character(piece_tokenizer: Tokenizer, text: str) -> None:
    ids = piece_tokenizer.encode(text.replace("\ufffd", ""))
    parts = parts_of(piece_tokenizer.detokenizer(), ids)
    assert "".join(parts) == piece_tokenizer.decode(ids)
    assert not any("\ufffd" in part for part in parts)


def test_emoji_arrives_whole(tokenizer: Tokenizer) -> None:
    detokenizer = tokenizer.detokenizer()
    ids = [tokenizer.encode(char)[0] for char in "a"]
    by_byte = {tokenizer.token_bytes(i): i for i in range(3, tokenizer.vocab_size)}
    ids += [by_byte[bytes([byte])] for byte in "🙂".encode()]
    assert [detokenizer.push(i) for i in ids] == ["a", "", "", "", "🙂"]
    assert detokenizer.flush() == ""


def test_unfinished_character_is_replaced_at_the_end(tokenizer: Tokenizer) -> None:
    by_byte = {tokenizer.token_bytes(i): i for i in range(3, tokenizer.vocab_size)}
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.push(by_byte["🙂".encode()[:1]]) == ""
    assert detokenizer.flush() == "\ufffd"


@pytest.mark.parametrize("special", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
def test_special_tokens_have_no_text(tokenizer: Tokenizer, special: str) -> None:
    (token_id,) = tokenizer.encode(special)
    assert tokenizer.detokenizer().push(token_id) == ""
