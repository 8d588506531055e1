"""Errors mirror the server's answers one to one."""

from collections.abc import Iterator

import httpx
import pytest
import quickchange_client
from quickchange_client import NO_RETRIES, Quickchange, errors
from quickchange_client.errors import ApiError, ErrorBody, api_error
from quickchange_server import errors as server_errors

NEVER_AN_ANSWER = "CannotStart"
# The server's root itself, and a refusal that is told apart by its `problems`.
WITHOUT_A_CLASS_THERE = {"InternalError", "UploadRefused"}


def server_answers(
    root: type[server_errors.QuickchangeError],
) -> Iterator[type[server_errors.QuickchangeError]]:
    for kind in root.__subclasses__():
        if kind.__name__ != NEVER_AN_ANSWER and kind.__module__ == server_errors.__name__:
            yield kind
            yield from server_answers(kind)


ANSWERS = list(server_answers(server_errors.QuickchangeError))


@pytest.mark.parametrize("kind", ANSWERS, ids=lambda kind: kind.__name__)
def test_each_answer_of_the_server_has_its_error(
    kind: type[server_errors.QuickchangeError],
) -> None:
    error = api_error(ErrorBody("why", code=kind.code, status=kind.status))
    assert type(error).__name__ == kind.__name__


def test_each_error_of_an_answer_is_one_of_the_server_s() -> None:
    ours = {kind.__name__ for kind in below(ApiError)}
    assert ours == {kind.__name__ for kind in ANSWERS} | WITHOUT_A_CLASS_THERE
    assert len(ours) >= 18


def below(root: type[Exception]) -> Iterator[type[Exception]]:
    for kind in root.__subclasses__():
        yield kind
        yield from below(kind)


def test_everything_is_of_one_tree_and_exported() -> None:
    kinds = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, Exception)
    ]
    for kind in kinds:
        assert issubclass(kind, errors.QuickchangeError)
        assert kind.__name__ in quickchange_client.__all__
        assert kind.__name__ in (errors.__doc__ or "")


def ask(response: httpx.Response) -> ApiError:
    """Return the error that an answer becomes."""
    transport = httpx.MockTransport(lambda request: response)
    with (
        Quickchange("http://fake", retry=NO_RETRIES, transport=transport) as client,
        pytest.raises(ApiError) as caught,
    ):
        client.memory()
    return caught.value


def test_an_error_carries_what_the_answer_says() -> None:
    body = {"error": {"message": "m", "type": "t", "param": "p", "code": "rate_limited"}}
    headers = {"retry-after": "9", "x-request-id": "r-1"}
    error = ask(httpx.Response(429, json=body, headers=headers))
    assert isinstance(error, errors.RateLimited)
    assert (str(error), error.type, error.param, error.code) == ("m", "t", "p", "rate_limited")
    assert (error.status, error.retry_after_s, error.request_id) == (429, 9.0, "r-1")


def test_a_refused_upload_lists_its_problems() -> None:
    problem = {"code": "no_effect", "where": "w", "message": "m", "hint": "h"}
    body = {"error": {"message": "m", "code": "no_effect"}, "problems": [problem]}
    error = ask(httpx.Response(400, json=body))
    assert isinstance(error, errors.UploadRefused)
    assert error.problems == (errors.Problem("no_effect", "w", "m", "h"),)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(503, errors.Unavailable), (404, errors.NotFound), (500, errors.InternalError)],
)
@pytest.mark.parametrize("text", ["<html>gateway</html>", "", '{"detail": "x"}', "[1]", "{"])
def test_an_answer_of_something_in_between_keeps_its_status(
    status: int, kind: type[ApiError], text: str
) -> None:
    error = ask(httpx.Response(status, text=text))
    assert isinstance(error, kind)
    assert str(status) in str(error)
    assert text[:5] in str(error)


@pytest.mark.parametrize("status", [302, 406, 418, 502])
def test_a_status_without_a_name_is_an_api_error(status: int) -> None:
    error = ask(httpx.Response(status, text="?"))
    assert type(error) is ApiError
    assert error.status == status


@pytest.mark.parametrize("body", ["<html>hello</html>", "[]", "7", ""])
def test_a_success_that_is_not_ours_is_said_so(body: str) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, text=body))
    with (
        Quickchange("http://fake", transport=transport) as client,
        pytest.raises(errors.AnswerInvalid, match="http://fake/v1/memory"),
    ):
        client.memory()


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_a_name_that_would_leave_its_path_is_never_sent(name: str) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json={}))
    with (
        Quickchange("http://fake", transport=transport) as client,
        pytest.raises(errors.ArgumentInvalid),
    ):
        client.adapters.delete(name)
