"""When a request is tried again, and after how long."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest
from quickchange_client.retry import RetryPolicy, retry_after_s

POLICY = RetryPolicy(max_retries=3, base_wait_s=1.0, max_wait_s=10.0)


def response(status: int, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(status, headers=named)


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_obeyed(status: int) -> None:
    assert POLICY.wait_s(response(status, retry_after="7"), 1, is_repeatable=False) == 7.0
    assert POLICY.wait_s(response(status, retry_after="0"), 1, is_repeatable=False) == 0.0


def test_a_longer_wait_than_allowed_is_for_the_caller_to_know() -> None:
    assert POLICY.wait_s(response(503, retry_after="11"), 1, is_repeatable=True) is None


def test_retry_after_may_be_a_date() -> None:
    moment = format_datetime(datetime.now(UTC) + timedelta(seconds=5), usegmt=True)
    wait_s = retry_after_s(response(503, retry_after=moment))
    assert wait_s is not None
    assert 3.0 < wait_s <= 5.0


@pytest.mark.parametrize("text", ["", "soon", "-3", "²"])
def test_a_senseless_retry_after_is_ignored(text: str) -> None:
    headers = {b"retry-after": text.encode()}
    assert retry_after_s(httpx.Response(503, headers=headers)) is None


@pytest.mark.parametrize("status", [400, 401, 404, 409, 412, 413, 500, 502, 504])
def test_other_answers_are_final(status: int) -> None:
    assert POLICY.wait_s(response(status, retry_after="0"), 1, is_repeatable=True) is None


def test_the_server_may_forbid_it() -> None:
    forbidden = response(503, x_should_retry="false")
    assert POLICY.wait_s(forbidden, 1, is_repeatable=True) is None


def test_tries_are_bounded() -> None:
    waits = [POLICY.wait_s(response(503), tries, is_repeatable=True) for tries in (1, 2, 3, 4)]
    assert waits[3] is None
    assert None not in waits[:3]


def test_waits_double_up_to_the_ceiling() -> None:
    policy = RetryPolicy(max_retries=9, base_wait_s=1.0, max_wait_s=4.0)
    for tries, full_s in ((1, 1.0), (2, 2.0), (3, 4.0), (8, 4.0)):
        wait_s = policy.wait_s(response(429), tries, is_repeatable=True)
        assert wait_s is not None
        assert full_s / 2 <= wait_s <= full_s


@pytest.mark.parametrize("kind", [httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout])
def test_what_was_never_sent_is_sent_again(kind: type[httpx.TransportError]) -> None:
    assert POLICY.wait_s(kind("no"), 1, is_repeatable=False) is not None


@pytest.mark.parametrize("kind", [httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError])
def test_what_may_have_arrived_is_sent_again_only_if_that_does_no_harm(
    kind: type[httpx.TransportError],
) -> None:
    assert POLICY.wait_s(kind("no"), 1, is_repeatable=True) is not None
    assert POLICY.wait_s(kind("no"), 1, is_repeatable=False) is None


def test_a_slow_answer_is_not_asked_for_twice() -> None:
    assert POLICY.wait_s(httpx.ReadTimeout("no"), 1, is_repeatable=True) is None
