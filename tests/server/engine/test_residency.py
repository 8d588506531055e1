"""Who holds which adapter, asked and changed by two threads at once."""

import sys
import threading
from dataclasses import replace
from pathlib import Path

from quickchange_adapters.host_adapter import pack_adapter
from quickchange_adapters.pool import AdapterPool
from quickchange_adapters.weights import AdapterWeights
from quickchange_server.engine.base_model import load_base
from quickchange_server.engine.interface import ResidentAdapter
from quickchange_server.engine.request import AdapterRef, GenerationRequest
from quickchange_server.engine.residency import AdapterResidency
from quickchange_server.engine.settings import EngineSettings

from tests.conftest import MakeAdapter
from tests.server.engine.conftest import MIB, peft_weights

NUM_ADAPTERS, NUM_ROUNDS = 200, 4
BYTES = 2 * 8 * (3 * 64 + 128) * 4  # layers, rank rows, q k v in and out, float32


def test_claims_of_one_thread_and_snapshots_of_another_do_not_meet(
    tiny_base: Path, make_adapter: MakeAdapter
) -> None:
    base = load_base(tiny_base, EngineSettings(dtype="float32"))
    pool = AdapterPool(base.layout, MIB, base.dtype, base.device)
    residency = AdapterResidency(pool, 1 << 30, 0)
    pairs = peft_weights(make_adapter(r=1, target_modules=["q_proj"])).pairs
    for index in range(NUM_ADAPTERS):
        weights = AdapterWeights(f"a{index}", pairs)
        residency.add_host(pack_adapter(weights, base.layout, base.dtype))
    requests = [
        GenerationRequest(f"r{index}", (1,), (AdapterRef(f"a{index}"),))
        for index in range(NUM_ADAPTERS)
    ]

    def claim() -> None:
        for _ in range(NUM_ROUNDS):
            for request in requests:
                assert residency.claim(request) is None

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    claiming = threading.Thread(target=claim)
    claiming.start()
    while claiming.is_alive():
        assert residency.host_bytes == NUM_ADAPTERS * BYTES
        assert len(residency.describe_all()) == NUM_ADAPTERS
    claiming.join()
    sys.setswitchinterval(interval)
    assert all(residency.num_users(f"a{index}") == NUM_ROUNDS for index in range(NUM_ADAPTERS))


class CountingResidency(AdapterResidency):
    """Counts how many versions it describes."""

    num_described = 0

    def describe(self, digest: str) -> ResidentAdapter:
        self.num_described += 1
        return super().describe(digest)


def test_a_snapshot_of_thousands_costs_what_has_changed(
    tiny_base: Path, make_adapter: MakeAdapter
) -> None:
    base = load_base(tiny_base, EngineSettings(dtype="float32"))
    pool = AdapterPool(base.layout, MIB, base.dtype, base.device)
    residency = CountingResidency(pool, 1 << 30, 0)
    pairs = peft_weights(make_adapter(r=1, target_modules=["q_proj"])).pairs
    packed = pack_adapter(AdapterWeights("a0", pairs), base.layout, base.dtype)
    for index in range(2000):
        residency.add_host(replace(packed, digest=f"a{index}"))
    assert len(residency.describe_all()) == residency.num_described == 2000
    residency.pin("a7")
    request = GenerationRequest("r", (1,), (AdapterRef("a9"),))
    assert residency.claim(request) is None
    slots = pool.acquire(replace(packed, digest="a11"))
    assert slots is not None
    found = residency.describe_all()
    assert residency.num_described == 2003
    assert found["a7"].is_pinned
    assert found["a9"].num_running == 1
    assert found["a11"].device_bytes == packed.num_bytes
    assert found == {digest: residency.describe(digest) for digest in found}
