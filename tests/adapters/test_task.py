"""task.json: what is read, what is refused with which words, and what the forms do to text."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quickchange_adapters.task import (
    KEYS,
    MAX_TASK_BYTES,
    Task,
    read_task,
    read_task_file,
    stored_task,
)

WHOLE = {
    "prompt": "Review: {input}\nVerdict:",
    "system": "Answer with one word.",
    "stop": ["\n", "."],
    "max_tokens": 4,
    "temperature": 0,
    "top_p": 0.5,
}


def read(values: object) -> Task:
    reading = read_task(json.dumps(values).encode())
    assert reading.problems == ()
    assert reading.task is not None
    return reading.task


def refusals(data: bytes) -> list[tuple[str, str]]:
    reading = read_task(data)
    assert (reading.task is None) == bool(reading.problems)
    assert all(problem.message for problem in reading.problems)
    return [(problem.code, problem.where) for problem in reading.problems]


def test_every_key_is_read_and_written_again() -> None:
    task = read(WHOLE)
    assert task == Task(WHOLE["prompt"], WHOLE["system"], ("\n", "."), 4, 0.0, 0.5)  # type: ignore[arg-type]
    assert task.to_json() == WHOLE
    assert read(task.to_json()) == task


def test_what_is_null_or_left_out_fills_nothing() -> None:
    assert read({}) == read(dict.fromkeys(KEYS)) == Task()
    assert Task().to_json() == {}


def test_one_stop_string_may_stand_alone() -> None:
    assert read({"stop": "END"}) == read({"stop": ["END"]}) == Task(stop=("END",))


@pytest.mark.parametrize(
    "values",
    [
        {"stop": ["x" * 256] * 16},
        {"temperature": 2},
        {"temperature": 0.0},
        {"top_p": 1},
        {"top_p": 1e-300},
        {"max_tokens": 1},
        {"max_tokens": (1 << 63) - 1},
        {"prompt": "{input}"},
        {"prompt": '{"review": "{input}"} {{}} {0} {input!r} %s $input {'},
        {"system": ""},
        {"stop": []},
    ],
)
def test_limits_are_inside(values: dict[str, Any]) -> None:
    assert read(values).to_json() == {key: v for key, v in values.items() if v != []}


BAD: dict[str, tuple[bytes | dict[str, Any], list[tuple[str, str]]]] = {
    "nothing": (b"", [("task_invalid", "task.json")]),
    "no JSON": (b"prompt: {input}", [("task_invalid", "task.json")]),
    "no object": (b'["{input}"]', [("task_invalid", "task.json")]),
    "null": (b"null", [("task_invalid", "task.json")]),
    "a key twice": (b'{"top_p": 1, "top_p": 0.5}', [("task_invalid", "task.json")]),
    "NaN": (b'{"temperature": NaN}', [("task_invalid", "task.json")]),
    "infinity": (b'{"temperature": 1e999}', [("task_invalid", "task.json")]),
    "no UTF-8": (b'{"system": "\xff"}', [("task_invalid", "task.json")]),
    "a byte order mark": (b"\xef\xbb\xbf{}", [("task_invalid", "task.json")]),
    "half a surrogate": (b'{"system": "\\ud800"}', [("task_invalid", "task.json")]),
    "UTF-16": ("{}".encode("utf-16"), [("task_invalid", "task.json")]),
    "nesting": (b'{"stop":' + b"[" * 16_000, [("task_invalid", "task.json")]),
    "nested keys": (b'{"a":' * 3_000, [("task_invalid", "task.json")]),
    "digits": (b'{"max_tokens": ' + b"9" * 9_000 + b"}", [("task_invalid", "task.json")]),
    "a comment": (b'{"top_p": 1} // yes', [("task_invalid", "task.json")]),
    "too large": (b'{"system": "%s"}' % (b"x" * MAX_TASK_BYTES), [("too_large", "task.json")]),
    "an unknown key": ({"max_token": 4}, [("task_invalid", "task.max_token")]),
    "a template language": ({"chat_template": "{{ 7 }}"}, [("task_invalid", "task.chat_template")]),
    "prompt: a number": ({"prompt": 5}, [("task_invalid", "task.prompt")]),
    "prompt: a list": ({"prompt": ["{input}"]}, [("task_invalid", "task.prompt")]),
    "prompt: no input": ({"prompt": "Review:"}, [("task_invalid", "task.prompt")]),
    "prompt: empty": ({"prompt": ""}, [("task_invalid", "task.prompt")]),
    "prompt: input twice": ({"prompt": "{input}{input}"}, [("task_invalid", "task.prompt")]),
    "prompt: another name": ({"prompt": "{text} {Input}"}, [("task_invalid", "task.prompt")]),
    "system: a message": ({"system": {"content": "x"}}, [("task_invalid", "task.system")]),
    "stop: a number": ({"stop": 5}, [("task_invalid", "task.stop")]),
    "stop: numbers": ({"stop": ["a", 5]}, [("task_invalid", "task.stop")]),
    "stop: too many": ({"stop": ["x"] * 17}, [("task_invalid", "task.stop")]),
    "stop: too long": ({"stop": "x" * 257}, [("task_invalid", "task.stop")]),
    "stop: empty": ({"stop": ["x", ""]}, [("task_invalid", "task.stop")]),
    "max_tokens: 0": ({"max_tokens": 0}, [("task_invalid", "task.max_tokens")]),
    "max_tokens: a fraction": ({"max_tokens": 4.5}, [("task_invalid", "task.max_tokens")]),
    "max_tokens: a float": ({"max_tokens": 4.0}, [("task_invalid", "task.max_tokens")]),
    "max_tokens: text": ({"max_tokens": "4"}, [("task_invalid", "task.max_tokens")]),
    "max_tokens: true": ({"max_tokens": True}, [("task_invalid", "task.max_tokens")]),
    "max_tokens: huge": ({"max_tokens": 1 << 63}, [("task_invalid", "task.max_tokens")]),
    "temperature: high": ({"temperature": 2.01}, [("task_invalid", "task.temperature")]),
    "temperature: negative": ({"temperature": -1}, [("task_invalid", "task.temperature")]),
    "temperature: false": ({"temperature": False}, [("task_invalid", "task.temperature")]),
    "temperature: huge": ({"temperature": 10**400}, [("task_invalid", "task.temperature")]),
    "top_p: 0": ({"top_p": 0}, [("task_invalid", "task.top_p")]),
    "top_p: above 1": ({"top_p": 1.01}, [("task_invalid", "task.top_p")]),
    "top_p: a list": ({"top_p": [1]}, [("task_invalid", "task.top_p")]),
    "everything": (
        {"Prompt": "", **dict.fromkeys(KEYS, -1)},
        [("task_invalid", f"task.{key}") for key in ("Prompt", *KEYS)],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_task_is_refused_with_its_code_and_key(name: str) -> None:
    content, expected = BAD[name]
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    assert refusals(data) == expected


def test_a_slip_of_the_finger_is_answered_with_the_key_that_was_meant() -> None:
    (problem,) = read_task(b'{"max_token": 4}').problems
    assert "'max_token'" in problem.message
    assert "'max_tokens'" in problem.hint
    (problem,) = read_task(b'{"zzz": 4}').problems
    assert all(key in problem.hint for key in KEYS)


def test_many_unknown_keys_are_named_up_to_a_number() -> None:
    found = refusals(json.dumps({f"k{i}": 1 for i in range(100)}).encode())
    assert found[:20] == [("task_invalid", f"task.k{i}") for i in range(20)]
    assert found[20:] == [("task_invalid", "task.json")]


def test_a_file_is_read_no_further_than_its_limit(tmp_path: Path) -> None:
    file = tmp_path / "task.json"
    text = json.dumps(WHOLE)
    file.write_text(text)
    reading = read_task_file(file)
    assert (reading.task, reading.text) == (read(WHOLE), text)
    assert stored_task(text) == reading
    with file.open("wb") as sparse:
        sparse.truncate(1 << 40)
    assert [problem.code for problem in read_task_file(file).problems] == ["too_large"]


def test_the_form_takes_the_text_as_it_is() -> None:
    task = read({"prompt": "{a} {input} {{b}}"})
    assert task.render_prompt("x") == "{a} x {{b}}"
    assert task.render_prompt("{input} {0} \\1 $") == "{a} {input} {0} \\1 $ {{b}}"
    assert Task().render_prompt("{input}") == "{input}"


def test_a_chat_gets_the_system_message_and_the_form_around_its_last_user_message() -> None:
    task = read({"prompt": "<{input}>", "system": "S"})
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    before = json.dumps(turns)
    assert task.render_chat(turns) == [
        {"role": "system", "content": "S"},
        *turns[:2],
        {"role": "user", "content": "<c>"},
        turns[3],
    ]
    assert json.dumps(turns) == before


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_message_of_the_caller_s_is_kept_instead(role: str) -> None:
    task = read({"system": "S"})
    turns = [{"role": "user", "content": "a"}, {"role": role, "content": "mine"}]
    assert task.render_chat(turns) == turns
    assert Task(system="").render_chat(turns[:1]) == [
        {"role": "system", "content": ""},
        {"role": "user", "content": "a"},
    ]


def test_a_chat_without_a_user_has_nothing_to_wrap() -> None:
    turns = [{"role": "assistant", "content": "a"}]
    assert Task(prompt="<{input}>").render_chat(turns) == turns


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=80), before=st.text(max_size=20), after=st.text(max_size=20))
def test_any_form_holds_any_text_once(text: str, before: str, after: str) -> None:
    reading = read_task(json.dumps({"prompt": f"{before}{{input}}{after}"}).encode())
    if reading.task is not None:
        assert reading.task.render_prompt(text) == before + text + after


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.just("{input}"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), VALUES, max_size=6))
def test_any_object_is_read_or_refused(values: dict[str, Any]) -> None:
    reading = read_task(json.dumps(values).encode())
    assert (reading.task is None) == bool(reading.problems)
    if reading.task is not None:
        assert read(reading.task.to_json()) == reading.task


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=200) | st.binary(max_size=60).map(lambda data: b'{"stop": ' + data + b"}")
)
def test_no_bytes_raise_anything(data: bytes) -> None:
    refusals(data)


@settings(max_examples=300, deadline=None)
@given(place=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_a_changed_byte_is_read_or_refused(place: int, byte: int) -> None:
    data = bytearray(json.dumps(WHOLE).encode())
    data[place % len(data)] = byte
    refusals(bytes(data))
