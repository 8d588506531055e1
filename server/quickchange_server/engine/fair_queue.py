"""The waiting line, in fair order: tenants first, then each tenant's adapters, then arrival.

| level | who is next |
|---|---|
| tenants | the one that was given least (`fair_accounts.py`) |
| within a tenant | what was preempted, oldest first; then the adapter or mix that was given least |
| within an adapter | the order of arrival |

A first admission is charged `PROMPT_WEIGHT` for each prompt token that must be computed, each
generated token `OUTPUT_WEIGHT`: a token of an answer occupies a row for a whole step, one of a
prompt shares its step with many. A preempted request is not charged again.

With n waiting, adding, removing, admitting and charging cost O(log n), amortised. Lines that could
not be served are tried again `MAX_RETRIES` a step, in turn, so a step costs
O((rows + MAX_RETRIES) log n) whatever waits. Knows no blocks, slots or tensors.
"""

from bisect import insort
from collections import Counter, OrderedDict, deque
from collections.abc import Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, zip_longest

from quickchange_server.engine.fair_accounts import Account, Accounts
from quickchange_server.engine.sequence import Sequence

PROMPT_WEIGHT = 1
OUTPUT_WEIGHT = 2
MAX_RETRIES = 64
RECENT_STEPS = 512


@dataclass(slots=True, eq=False)
class Line(Account):
    """What waits for one adapter, or one mix, of one tenant; `is_parked`: tried, and not served."""

    fresh: OrderedDict[Sequence, None] = field(default_factory=OrderedDict)
    is_parked: bool = False

    @property
    def is_ready(self) -> bool:
        """Whether its first request may be tried."""
        return bool(self.fresh) and not self.is_parked


@dataclass(slots=True, eq=False)
class Tenant(Account):
    """A tenant's lines, and its preempted requests, oldest first."""

    lines: Accounts[Line] = field(default_factory=lambda: Accounts(Line, lambda a: a.is_ready))
    returned: list[Sequence] = field(default_factory=list)
    is_returned_aside: bool = False
    is_aside: bool = False

    @property
    def head(self) -> Sequence | None:
        """The request that is next."""
        if self.returned and not self.is_returned_aside:
            return self.returned[0]
        line = self.lines.least_served()
        return None if line is None else next(iter(line.fresh))


class FairQueue:
    """Waiting requests in fair order, and the accounts of all that wait or run."""

    def __init__(self) -> None:
        self._tenants: Accounts[Tenant] = Accounts(
            Tenant, lambda tenant: not tenant.is_aside and tenant.head is not None
        )
        self._places: dict[Sequence, tuple[Tenant, Line]] = {}
        self._waiting: dict[Sequence, None] = {}
        self._by_id: dict[str, Sequence] = {}
        self._active: set[Tenant] = set()
        self._recent: OrderedDict[Hashable, int] = OrderedDict()
        self._parked: deque[tuple[Tenant, Line]] = deque()
        self._aside: list[Tenant] = []
        self._step = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._waiting

    @property
    def num_tenants(self) -> int:
        """Tenants of which something waits or runs."""
        return len(self._active)

    @property
    def num_recent_tenants(self) -> int:
        """Tenants of which nothing waits or runs, but did in the last `RECENT_STEPS` steps."""
        while self._recent and next(iter(self._recent.values())) < self._step - RECENT_STEPS:
            self._recent.popitem(last=False)
        return len(self._recent)

    @property
    def floor(self) -> int:
        """The counter of the least served tenant that waits."""
        return self._tenants.floor

    def tenant_of(self, sequence: Sequence) -> Tenant:
        """Return the account of a live request's tenant."""
        return self._places[sequence][0]

    def line_of(self, sequence: Sequence) -> Line:
        """Return the account of a live request's adapters."""
        return self._places[sequence][1]

    def find(self, request_id: str) -> Sequence | None:
        """Return the live sequence of a request, waiting or running."""
        return self._by_id.get(request_id)

    def add(self, sequence: Sequence) -> None:
        """Put a new request at the end of its line."""
        request = sequence.request
        tenant = self._tenants.open(request.tenant)
        line = tenant.lines.open(tuple(adapter.digest for adapter in request.adapters))
        self._places[sequence] = (tenant, line)
        self._by_id[request.request_id] = sequence
        self._active.add(tenant)
        self._recent.pop(tenant.name, None)
        line.fresh[sequence] = None
        self._begin_waiting(sequence, is_new=True)

    def put_back(self, sequence: Sequence) -> None:
        """Let a running request wait again, before all of its tenant's that never ran."""
        tenant, line = self._places[sequence]
        tenant.num_running -= 1
        line.num_running -= 1
        insort(tenant.returned, sequence, key=lambda each: each.arrival_s)
        self._begin_waiting(sequence, is_new=False)

    def admit(self, sequence: Sequence) -> None:
        """Take a waiting request out: it runs now."""
        self._end_waiting(sequence, is_admitted=True)

    def remove(self, sequence: Sequence) -> None:
        """Forget a request that ended, wherever it is."""
        tenant, line = self._places[sequence]
        if sequence in self._waiting:
            self._end_waiting(sequence, is_admitted=False)
        else:
            tenant.lines.end_running(line)
            self._tenants.end_running(tenant)
        del self._places[sequence], self._by_id[sequence.request_id]
        if tenant.is_idle:
            self._active.remove(tenant)
            self._recent[tenant.name] = self._step

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        """Count what a request was given, weights applied."""
        for account in self._places[sequence]:
            account.counter += num_tokens

    def start_step(self) -> None:
        """Begin a step: some of the lines that could not be served may be tried again."""
        self._step += 1
        for _ in range(min(len(self._parked), MAX_RETRIES)):
            tenant, line = self._parked.popleft()
            line.is_parked = False
            tenant.lines.make_ready(line)
            self._tenants.make_ready(tenant)

    def start_pass(self) -> None:
        """Look at every tenant again."""
        for tenant in self._aside:
            tenant.is_aside = tenant.is_returned_aside = False
            self._tenants.make_ready(tenant)
        self._aside.clear()

    def next(self) -> Sequence | None:
        """Return the request that is next; it stays where it is."""
        tenant = self._tenants.least_served()
        return None if tenant is None else tenant.head

    def upcoming(self, number: int) -> list[Sequence]:
        """Return about who is next if nothing else comes: the first of each line, tenants in turn.

        A guess, for what may be prepared ahead; costs no more when thousands wait.
        """
        tenants = self._tenants.next_served(number)
        firsts = [list(_firsts(tenant, -(-number // len(tenants)))) for tenant in tenants]
        in_turn = chain.from_iterable(zip_longest(*firsts))
        return [each for each in in_turn if each is not None][:number]

    def pass_over(self, sequence: Sequence) -> None:
        """Let others pass a request that is next: of its tenant too, but not of its line."""
        tenant, line = self._places[sequence]
        if sequence not in tenant.returned:
            if not line.is_parked:
                self._parked.append((tenant, line))
            line.is_parked = True
        else:
            tenant.is_returned_aside = True
            self._aside.append(tenant)

    def set_tenant_aside(self, sequence: Sequence) -> None:
        """Let others pass all of a tenant's requests until the next pass."""
        tenant = self.tenant_of(sequence)
        tenant.is_aside = True
        self._aside.append(tenant)

    def check_integrity(self, running: Collection[Sequence]) -> None:
        """Assert that every live request is counted once, where it is."""
        assert self._places.keys() == {*self._waiting, *running}
        assert len(self._by_id) == len(self._places)
        waiting, rows = (Counter(self._accounts_of(each)) for each in (self._waiting, running))
        for account in self._accounts_of(self._places):
            assert (account.num_waiting, account.num_running) == (waiting[account], rows[account])
        assert self._active == {tenant for tenant, _ in self._places.values()}

    def _accounts_of(self, sequences: Iterable[Sequence]) -> Iterator[Account]:
        return chain.from_iterable(self._places[sequence] for sequence in sequences)

    def _begin_waiting(self, sequence: Sequence, *, is_new: bool) -> None:
        tenant, line = self._places[sequence]
        self._waiting[sequence] = None
        tenant.lines.begin_waiting(line, self._step, is_new=is_new)
        self._tenants.begin_waiting(tenant, self._step, is_new=is_new)

    def _end_waiting(self, sequence: Sequence, *, is_admitted: bool) -> None:
        tenant, line = self._places[sequence]
        del self._waiting[sequence]
        if sequence in line.fresh:
            del line.fresh[sequence]
        else:
            tenant.returned.remove(sequence)
        tenant.lines.end_waiting(line, self._step, is_admitted=is_admitted)
        self._tenants.end_waiting(tenant, self._step, is_admitted=is_admitted)


def _firsts(tenant: Tenant, number: int) -> Iterator[Sequence]:
    """Yield a tenant's requests that are next: of each adapter one."""
    yield from tenant.returned[:number]
    lines = tenant.lines.next_served(number)
    yield from (next(iter(line.fresh)) for line in lines)
