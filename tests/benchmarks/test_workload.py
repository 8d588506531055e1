"""What is asked of a server: scenarios, the adapter mix, prompts."""

from collections import Counter

import pytest

from benchmarks.workload import (
    DEFAULT_SCENARIOS,
    Prompts,
    Scenario,
    adapter_name,
    max_adapters,
    parse_scenarios,
)


def test_scenarios_are_read_and_written_alike() -> None:
    text = "base:1,8:16,merged:2,1:1"
    scenarios = parse_scenarios(text)
    expected = (Scenario(0, 1), Scenario(8, 16), Scenario(1, 2, is_merged=True), Scenario(1, 1))
    assert scenarios == expected
    assert ",".join(scenario.label for scenario in scenarios) == text


def test_scenarios_have_titles() -> None:
    titles = [scenario.title for scenario in parse_scenarios("base:1,1:16,8:16,merged:1")]
    assert titles == [
        "base, 1 client",
        "1 adapter, 16 clients",
        "8 adapters, 16 clients",
        "1 adapter, merged, 1 client",
    ]


@pytest.mark.parametrize("text", ["", "8", "8:", "8:0", "x:1", "-1:4", "8:1.5", "base:1,,1:1"])
def test_what_is_no_scenario_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no scenario"):
        parse_scenarios(text)


def test_as_many_adapters_are_made_as_the_largest_scenario_uses() -> None:
    assert max_adapters(parse_scenarios(DEFAULT_SCENARIOS)) == 32
    assert max_adapters(parse_scenarios("base:4")) == 0
    assert max_adapters(parse_scenarios("base:4,merged:1")) == 1


def test_adapters_take_turns_evenly() -> None:
    scenario = Scenario(8, 16)
    used = [scenario.adapter_of(i) for i in range(32)]
    assert used[:9] == [0, 1, 2, 3, 4, 5, 6, 7, 0]
    assert set(Counter(used).values()) == {4}


def test_the_base_alone_uses_no_adapter() -> None:
    assert {Scenario(0, 4).adapter_of(i) for i in range(8)} == {None}


def test_no_prompt_comes_twice_and_equal_seeds_give_equal_prompts() -> None:
    prompts, again = Prompts(64, seed=3), Prompts(64, seed=3)
    taken = [prompts.take() for _ in range(200)]
    assert len(set(taken)) == 200
    assert {len(prompt.split()) for prompt in taken} == {64}
    assert taken == [again.take() for _ in range(200)]
    assert Prompts(64, seed=4).take() != taken[0]


def test_adapter_names_sort_as_their_numbers() -> None:
    names = [adapter_name(i) for i in range(300)]
    assert names == sorted(names)
