"""The order of a run against `quickchange serve`, and how long each part takes at most."""

import shutil
import time
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from benchmarks.failure import BenchmarkFailure
from benchmarks.gpu_server_api import Api
from benchmarks.gpu_server_checks import ApiChecks, is_answering
from benchmarks.gpu_server_findings import Check, Checks, Outcome
from benchmarks.gpu_server_loads import GAP_HEADER, LoadSizes, ServerLoads
from benchmarks.gpu_server_loads import HEADER as LOAD_HEADER
from benchmarks.gpu_server_merging import MergeChecks
from benchmarks.gpu_server_model import (
    MISSHAPEN,
    SECOND,
    SHAPES,
    UPLOADED,
    Shape,
    write_adapters,
    write_base,
)
from benchmarks.gpu_server_oracle import Oracle
from benchmarks.gpu_server_process import WatchedServer, run_command, trouble_in
from benchmarks.gpu_session import Section, Session
from benchmarks.workload import adapter_name

BASE = "random-base"
ORACLE_ADAPTERS = tuple(adapter_name(index) for index in (0, 1, 2))
DRAIN_TIMEOUT_S = 30.0
KEPT_S = 15.0
"""Of the budget, for the end: a server that never becomes ready shall not take it."""


KINDS = (
    "loads",
    "gaps",
    "answers",
    "changes",
    "merging",
    "refusals",
    "agreement",
    "starts",
    "int8",
)


class ServerPlan:
    """One run: a base, its adapters, two servers, all checks."""

    def __init__(self, session: Session, folder: Path, shape: Shape, device: torch.device) -> None:
        self._session = session
        self._checks = Checks(session)
        self._folder = folder
        self._shape = shape
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._dtype = torch.bfloat16 if self._on_gpu else torch.float32
        self._sizes = LoadSizes() if self._on_gpu else LoadSizes.trial()
        self._adapters: dict[str, Path] = {}
        self._servers: list[WatchedServer] = []
        self._threads = ThreadPoolExecutor(4)

    def run(self, kinds: Collection[str]) -> None:
        """Do everything of these kinds, what tells most first."""
        model = write_base(self._folder / "base", self._shape, self._dtype, self._device)
        server = self._start("serve", self._folder / "base", "--max-batch-rows", "64")
        self._adapters = write_adapters(model, self._folder / "adapters")
        del model
        self._release_memory()
        self._checks.run("Start", 0, {"ready": partial(self._ready, server)})
        if server.code is not None or not is_answering(server.url):
            raise BenchmarkFailure(f"there is no server to ask: {server.text[-3000:]}")
        self._use(server, kinds)

    def close(self) -> None:
        """End what still runs, and keep the logs."""
        for server in self._servers:
            server.kill()
            if self._session.folder is not None:
                shutil.copy(server.log, self._session.folder / server.log.name)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _use(self, server: WatchedServer, kinds: Collection[str]) -> None:
        api = Api(server.url)
        asked = ApiChecks(api, BASE, self._adapters, on_gpu=self._on_gpu)
        merging = MergeChecks(api, BASE)
        self._checks.run("Uploads", 0, {"eight adapters": partial(self._upload_all, api, merging)})
        loads = ServerLoads(server.target(), self._sizes, self._adapters[UPLOADED])
        if "loads" in kinds:
            self._session.run(Section("Loads", LOAD_HEADER, 15, loads.rows))
        if "gaps" in kinds:
            self._session.run(Section("Gaps of streams", GAP_HEADER, 15, loads.gap_rows))
        refusals = self._begin_refusals() if "starts" in kinds else {}
        int8 = self._start_int8() if "int8" in kinds else {}
        sections = {
            "answers": ("Answers", 3.0, asked.answers()),
            "changes": ("Changes", 3.0, asked.changes()),
            "merging": ("Merging", 5.0, merging.checks()),
            "refusals": ("Refusals", 2.0, asked.refusals()),
            "agreement": ("Agreement", 10.0, self._oracle().checks(api, BASE)),
            "starts": ("Starts that are refused", 5.0, refusals),
            "int8": ("int8", 5.0, int8),
        }
        for kind, section in sections.items():
            if kind in kinds:
                self._checks.run(*section)
        self._checks.run("Ends", 3, asked.ends())
        self._checks.run("The end", 0, self._end(server, api))

    def _start(self, name: str, base: Path, *options: str) -> WatchedServer:
        server = WatchedServer(
            [
                *("--model", str(base), "--served-model-name", BASE),
                *("--device", str(self._device), "--dtype", self._dtype_name),
                *options,
            ],
            self._folder / f"store-{name}",
            self._folder / f"{name}.log",
        )
        self._servers.append(server)
        return server

    @property
    def _dtype_name(self) -> str:
        return str(self._dtype).removeprefix("torch.")

    def _ready(self, server: WatchedServer) -> Outcome:
        server.wait_until_ready(max(self._session.left_s - KEPT_S, 1))
        return f"{server.ready_s:.1f} s after its start", True

    def _upload_all(self, api: Api, merging: MergeChecks) -> Outcome:
        """Upload all adapters of the loads, and note the base's answer before."""
        merging.remember_base()
        names = [name for name in self._adapters if name not in (SECOND, UPLOADED, MISSHAPEN)]
        statuses, times = [], []
        for name in names:
            started_s = time.monotonic()
            statuses.append(api.upload(name, self._adapters[name]).status)
            times.append(time.monotonic() - started_s)
        figure = f"{sum(times):.1f} s, the slowest {max(times):.1f} s, the last {times[-1]:.2f} s"
        return figure, statuses == [201] * len(names)

    def _oracle(self) -> Oracle:
        adapters = {name: self._adapters[name] for name in ORACLE_ADAPTERS}
        return Oracle(self._folder / "base", adapters, self._dtype, self._device)

    def _begin_refusals(self) -> Mapping[str, Check]:
        """Run starts that must fail beside the rest; the checks wait for them."""
        serve = ("serve", "--model", str(self._folder / "base"), "--dtype", self._dtype_name)
        on_device = (*serve, "--device", str(self._device))
        expected = {
            "a GPU that is not there": ((*serve, "--device", "cuda:99"), "can use"),
            "more memory than there is": (
                (*on_device, "--kv-cache-bytes", "9000GiB"),
                "not enough memory",
            ),
        }
        if self._on_gpu:
            expected["--auto-merge"] = ((*on_device, "--auto-merge"), "--auto-merge is for CPUs")
        store = ("--store", str(self._folder / "store-refused"), "--port", "0")
        return {
            name: _refusal((*arguments, *store), said, self._threads)
            for name, (arguments, said) in expected.items()
        } | {"doctor finds no problem": self._doctor()}

    def _doctor(self) -> Check:
        arguments = ("doctor", "--model", str(self._folder / "base"), "--device", str(self._device))
        store = ("--store", str(self._folder / "store-doctor"), "--port", "0")
        coming = self._threads.submit(run_command, *arguments, *store)

        def check() -> Outcome:
            ended = coming.result()
            device = [line for line in ended.text.splitlines() if " device " in line]
            return " ".join((device or [ended.text])[0].split())[:120], ended.code == 0

        return check

    def _start_int8(self) -> Mapping[str, Check]:
        """Start a second, small server whose base is in int8; the check waits for it."""
        folder = self._folder / "int8"
        small = SHAPES["small"] if self._on_gpu else SHAPES["tiny"]
        dtype = torch.bfloat16  # int8 is for half-precision bases
        model = write_base(folder, small, dtype, self._device)
        write_adapters(model, self._folder / "int8-adapters")
        options = "--quantize int8 --dtype bfloat16 --max-batch-rows 4 --merged-bytes 0"
        sizes = "--kv-cache-bytes 64MiB --adapter-device-bytes 64MiB"
        kernels = f"--kernels {'auto' if self._on_gpu else 'plain'}"
        server = self._start("int8", folder, *f"{options} {sizes} {kernels}".split())
        return {"a base in int8": partial(self._int8, server)}

    def _int8(self, server: WatchedServer) -> Outcome:
        """It serves, with an adapter, or it says in a sentence why it does not."""
        try:
            server.wait_until_ready(max(self._session.left_s - KEPT_S, 1))
        except BenchmarkFailure as failure:
            is_sentence = server.code not in (None, 0) and not trouble_in(server.text)
            return f"refused: {failure}"[:200], is_sentence
        api = Api(server.url)
        name = adapter_name(0)
        status = api.upload(name, self._folder / "int8-adapters" / name).status
        texts = {api.text(model, "time year people", max_tokens=8) for model in (BASE, name)}
        server.terminate()
        is_good = status == 201 and len(texts) == 2
        return f"ready after {server.ready_s:.1f} s, {len(texts)} answers", is_good

    def _end(self, server: WatchedServer, api: Api) -> Mapping[str, Check]:
        return {
            "SIGTERM lets streams end": partial(self._drain, server, api),
            "logs hold no trouble": self._logs,
        }

    def _drain(self, server: WatchedServer, api: Api) -> Outcome:
        """Streams that run at the signal are served to their ends, and the code is 0."""
        body = {"prompt": "time year", "max_tokens": 300, "ignore_eos": True, "temperature": 0}
        models = (BASE, adapter_name(0), adapter_name(2))
        streams = [api.open_stream({**body, "model": model}) for model in models]
        started_s = time.monotonic()
        server.terminate()
        num_whole = sum(stream.rest().rstrip().endswith("data: [DONE]") for stream in streams)
        code = server.wait(DRAIN_TIMEOUT_S)
        seconds = time.monotonic() - started_s
        figure = f"{num_whole} of {len(streams)} whole, code {code} after {seconds:.1f} s"
        return figure, num_whole == len(streams) and code == 0

    def _logs(self) -> Outcome:
        found = [line for server in self._servers for line in trouble_in(server.text)]
        return found[0][:200] if found else f"{len(self._servers)} logs", not found

    def _release_memory(self) -> None:
        if self._on_gpu:
            torch.cuda.empty_cache()


def _refusal(arguments: tuple[str, ...], said: str, threads: ThreadPoolExecutor) -> Check:
    coming = threads.submit(run_command, *arguments)

    def check() -> Outcome:
        ended = coming.result()
        lines = [line for line in ended.text.splitlines() if line.strip()]
        is_good = ended.code not in (0, None) and said in ended.text.replace("\n", " ")
        return f"code {ended.code}: {' '.join(lines[-2:])}"[:160], is_good and not trouble_in(
            ended.text
        )

    return check
