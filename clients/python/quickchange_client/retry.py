"""When to try a request again, and how long to wait first. Sends nothing itself.

| what happened                       | tried again                                        |
|-------------------------------------|----------------------------------------------------|
| no connection could be made         | always: nothing was sent                           |
| 429, 503                            | always: the server did not begin, and says so      |
| the connection broke off            | if doing it twice does what doing it once does     |
| no answer in time                   | never                                              |
| `x-should-retry: false`             | never                                              |
| `Retry-After` above `max_wait_s`    | never: the caller should know                      |
"""

import random
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import httpx

RETRIED_STATUSES = frozenset({429, 503})
NOT_CONNECTED = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
BROKEN_OFF = (httpx.ReadError, httpx.WriteError, httpx.CloseError, httpx.RemoteProtocolError)

Outcome = httpx.Response | httpx.TransportError


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """At most `max_retries` further tries; waits double from `base_wait_s`, with some chance.

    `Retry-After` takes the place of the computed wait. No wait is longer than `max_wait_s`.
    """

    max_retries: int = 2
    base_wait_s: float = 0.5
    max_wait_s: float = 30.0

    def wait_s(self, outcome: Outcome, num_tries: int, is_repeatable: bool) -> float | None:
        """Return how long to wait before the next try; None means to give up."""
        if num_tries > self.max_retries or not _may_retry(outcome, is_repeatable):
            return None
        asked_s = retry_after_s(outcome) if isinstance(outcome, httpx.Response) else None
        if asked_s is None:
            return self._backoff_s(num_tries)
        return asked_s if asked_s <= self.max_wait_s else None

    def _backoff_s(self, num_tries: int) -> float:
        full_s = min(self.max_wait_s, self.base_wait_s * 2.0 ** (num_tries - 1))
        return full_s * random.uniform(0.5, 1.0)


NO_RETRIES = RetryPolicy(max_retries=0)


def retry_after_s(response: httpx.Response) -> float | None:
    """Return what `Retry-After` asks for: seconds, or a date; None if it says nothing usable."""
    text = response.headers.get("retry-after", "")
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def _may_retry(outcome: Outcome, is_repeatable: bool) -> bool:
    if isinstance(outcome, httpx.Response):
        is_forbidden = outcome.headers.get("x-should-retry", "").lower() == "false"
        return outcome.status_code in RETRIED_STATUSES and not is_forbidden
    if isinstance(outcome, NOT_CONNECTED):
        return True
    return isinstance(outcome, BROKEN_OFF) and is_repeatable
