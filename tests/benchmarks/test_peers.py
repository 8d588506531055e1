"""The comparison with peers: rounds, failures, ratios, and the folders that peers live in."""

import asyncio
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.closed_loop import Selector, Work, by_model
from benchmarks.failure import BenchmarkFailure
from benchmarks.machine import ROOT
from benchmarks.peers.compare import prepared, read_systems, run_all
from benchmarks.peers.environment import PeerEnvironment
from benchmarks.peers.llama_server import LlamaServer
from benchmarks.peers.outcome import (
    Outcome,
    detail_table,
    outcome_results,
    ratio,
    ratio_table,
)
from benchmarks.peers.system import (
    Job,
    Measured,
    ServerSystem,
    System,
    check_adapter_acts,
    with_and_without_adapters,
)
from benchmarks.peers.vllm_server import VllmServer
from benchmarks.server_process import Target
from benchmarks.timing import Figures
from benchmarks.workload import Prompts, Scenario, parse_scenarios
from tests.benchmarks.recording_server import NUM_TOKENS, RecordingServer, recording

BASE, MIX = SCENARIOS = parse_scenarios("base:1,8:16")


def figures(rate: float) -> Figures:
    return Figures(rate, 0.1, 0.2, 0.01, 0.02, 0.015, 1.0, 2.0, 1.0, 0.1, 1.9)


def outcome_of(*rates: float, scenario: Scenario = BASE) -> Outcome:
    outcome = Outcome()
    for rate in rates:
        outcome.add(scenario, figures(rate))
    return outcome


def job_of(tmp_path: Path, scenarios: Sequence[Scenario] = SCENARIOS) -> Job:
    work = Work(Prompts(4, seed=0), NUM_TOKENS, requests_per_client=2)
    return Job(tmp_path, [tmp_path / "bench-000", tmp_path / "bench-001"], 16, work, scenarios)


class ListedSystem(System):
    """Gives what it was told, one call after the other; a sentence stands for a failure."""

    def __init__(self, name: str, *rounds: Sequence[float | str], fault: str = "") -> None:
        self.name = name
        self.asked: list[list[Scenario]] = []
        self._rounds = iter(rounds)
        self._fault = fault

    def prepare(self) -> None:
        if self._fault:
            raise BenchmarkFailure(self._fault)

    def describe(self) -> str:
        return f"{self.name} 1.0"

    def measure(self, scenarios: Sequence[Scenario]) -> Iterator[Measured]:
        self.asked.append(list(scenarios))
        for scenario, given in zip(scenarios, next(self._rounds), strict=True):
            if isinstance(given, str):
                raise BenchmarkFailure(given)
            yield scenario, figures(given)


def test_a_ratio_is_the_median_of_the_ratios_of_rounds() -> None:
    ours, theirs = outcome_of(100, 40, 90), outcome_of(50, 10, 90)
    assert ratio(ours, theirs, BASE) == 2.0
    assert ratio(ours, theirs, MIX) is None
    assert ratio(ours, Outcome(), BASE) is None


def test_the_table_shows_each_peer_and_the_best_one() -> None:
    outcomes = {"ours": outcome_of(60), "slow": outcome_of(20), "fast": outcome_of(30)}
    outcomes["broken"] = Outcome()
    row = ratio_table(outcomes, "ours", [BASE]).splitlines()[2]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    shown = ["60.0", "20.0", "3.00×", "30.0", "2.00×", "not measured", "–", "2.00× (fast)"]
    assert cells == ["base, 1 client", *shown]


def test_an_answer_of_one_token_has_no_gaps() -> None:
    outcome = Outcome()
    outcome.add(BASE, Figures(9.0, 0.1, 0.2, math.nan, math.nan, 0.0, 1.0, 2.0, 1.0))
    row = detail_table({"ours": outcome}, [BASE]).splitlines()[2]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:] == ["9.0 (9.0–9.0)", "100 / 200", "– / –", "0.0", "–"]


def test_what_failed_stands_in_the_table_with_its_reason() -> None:
    outcomes = {"ours": outcome_of(60), "peer": Outcome()}
    outcomes["peer"].fail([BASE], "not installed: no | wheel\nfor this Python")
    table = detail_table(outcomes, [BASE])
    assert "not measured: not installed: no \\| wheel for this Python" in table
    stored = json.loads(json.dumps(outcome_results(outcomes, "ours", [BASE])))
    assert stored[1]["failure"] == "not installed: no | wheel for this Python"
    assert stored[0]["runs"][0]["tokens_per_s"] == 60


def test_a_scenario_that_failed_is_not_tried_again_and_earlier_rounds_count(
    tmp_path: Path,
) -> None:
    system = ListedSystem("peer", (10.0, 20.0), (12.0, "it crashed"), (14.0,))
    outcomes = {"peer": Outcome()}
    run_all([system], outcomes, job_of(tmp_path), repeats=3)
    assert system.asked == [[BASE, MIX], [BASE, MIX], [BASE]]
    assert outcomes["peer"].tokens_per_s(BASE) == [10.0, 12.0, 14.0]
    assert outcomes["peer"].tokens_per_s(MIX) == [20.0]
    assert outcomes["peer"].failures == {MIX: "it crashed"}
    assert "20.0 (20.0–20.0); 1 rounds, then: " in detail_table(outcomes, [MIX])


def test_a_peer_that_cannot_be_installed_is_not_run_and_the_others_are(tmp_path: Path) -> None:
    broken = ListedSystem("broken", fault="no compiler")
    sound = ListedSystem("sound", (1.0, 2.0))
    outcomes, descriptions = prepared([broken, sound], job_of(tmp_path))
    run_all([broken, sound], outcomes, job_of(tmp_path), repeats=1)
    assert broken.asked == []
    assert descriptions == {"broken": "not installed: no compiler", "sound": "sound 1.0"}
    assert set(outcomes["broken"].failures) == set(SCENARIOS)
    assert outcomes["sound"].tokens_per_s(MIX) == [2.0]


def test_each_round_begins_with_another_system(tmp_path: Path) -> None:
    order: list[str] = []

    class Noting(ListedSystem):
        def measure(self, scenarios: Sequence[Scenario]) -> Iterator[Measured]:
            order.append(self.name)
            yield from super().measure(scenarios)

    systems = [Noting(name, *[(1.0, 2.0)] * 3) for name in "abc"]
    run_all(systems, {name: Outcome() for name in "abc"}, job_of(tmp_path), repeats=3)
    assert "".join(order) == "abcbcacab"


def test_the_base_is_measured_apart_where_adapters_slow_it() -> None:
    scenarios = parse_scenarios("base:1,1:1,base:16,8:16")
    groups = with_and_without_adapters(scenarios)
    labels = [[scenario.label for scenario in group] for group in groups]
    assert labels == [["base:1", "base:16"], ["1:1", "8:16"]]
    assert with_and_without_adapters(scenarios[:1]) == [[scenarios[0]]]


async def test_a_server_is_warmed_and_asked_in_its_own_words(tmp_path: Path) -> None:
    class Numbered(ServerSystem):
        name = "numbered"

        def __init__(self, job: Job, target: Target) -> None:
            super().__init__(job)
            self._target = target
            self.num_adapters = -1

        def prepare(self) -> None: ...

        def describe(self) -> str:
            return ""

        @contextmanager
        def serving(self, num_adapters: int) -> Iterator[Target]:
            self.num_adapters = num_adapters
            yield self._target

        @property
        def select(self) -> Selector:
            return LlamaServer(self.job, tmp_path).select

    scenarios = parse_scenarios("base:1,2:2")
    async with recording() as (server, target):
        system = Numbered(job_of(tmp_path, scenarios), target)
        measured = await asyncio.to_thread(lambda: list(system.measure(scenarios)))
    assert [scenario for scenario, _ in measured] == list(scenarios)
    assert system.num_adapters == 2
    assert warmed_and_measured(server) == (3, 6)
    measured_bodies = [body for body in server.bodies if body["max_tokens"] == NUM_TOKENS]
    loras = [body["lora"] for body in measured_bodies]
    assert loras[:2] == [[{"id": 0, "scale": 0.0}]] * 2
    one, other = ([{"id": number, "scale": 1.0}] for number in range(2))
    assert (loras.count(one), loras.count(other)) == (2, 2)


async def test_a_server_that_leaves_the_adapter_out_is_not_measured(tmp_path: Path) -> None:
    prompts = Prompts(4, seed=0)
    for select in (by_model, LlamaServer(job_of(tmp_path), tmp_path).select):
        async with recording(is_deaf=True) as (_, target):
            with pytest.raises(BenchmarkFailure, match="an adapter changes nothing"):
                await asyncio.to_thread(check_adapter_acts, target, select, prompts)
        async with recording() as (_, target):
            await asyncio.to_thread(check_adapter_acts, target, select, prompts)


def warmed_and_measured(server: RecordingServer) -> tuple[int, int]:
    lengths = [body["max_tokens"] for body in server.bodies]
    return lengths.count(4), lengths.count(NUM_TOKENS)


def test_a_folder_is_made_once_per_recipe_and_anew_after_a_failure(tmp_path: Path) -> None:
    environment = PeerEnvironment(tmp_path / "peer")
    made: list[str] = []

    def steps(where: PeerEnvironment) -> None:
        made.append(where.run([sys.executable, "-c", "print('made')"]))

    def failing(where: PeerEnvironment) -> None:
        where.run([sys.executable, "-c", "print('no such wheel'); raise SystemExit(3)"])

    environment.install("one", steps)
    environment.install("one", steps)
    assert made == ["made\n"]
    assert "made" in (tmp_path / "peer/commands.log").read_text()
    with pytest.raises(BenchmarkFailure, match="failed with 3: no such wheel"):
        environment.install("two", failing)
    environment.install("two", steps)
    assert len(made) == 2


def test_a_command_that_is_missing_is_said_by_name(tmp_path: Path) -> None:
    environment = PeerEnvironment(tmp_path)
    with pytest.raises(BenchmarkFailure, match="no-such-compiler"):
        environment.run(["no-such-compiler", "--version"])


def test_peers_serve_the_base_without_any_adapter(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    for server in (VllmServer(job, tmp_path), LlamaServer(job, tmp_path)):
        assert server.groups(job.scenarios) == [[BASE], [MIX]]


@pytest.mark.parametrize(("text", "unknown"), [("vllm,sglang", "sglang"), ("", "")])
def test_systems_that_are_not_known_are_refused(text: str, unknown: str) -> None:
    with pytest.raises(ValueError, match=f"'{unknown}' is none of"):
        read_systems(text)


def test_the_script_runs_as_a_file_from_anywhere(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/peers/compare.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "--systems" in done.stdout
