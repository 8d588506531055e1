"""What a step costs, learned: coefficients of a known machine, noise, and what was never seen."""

import random

import pytest
from quickchange_server.engine.step_costs import NEEDED_STEPS, StepCosts, StepLoad

MACHINE = {
    "fixed": 8e-3,
    "decode": 0.5e-3,
    "prompt": 0.75e-3,
    "adapted decode": 0.25e-3,
    "adapted prompt": 0.08e-3,
}


def seconds_of(load: StepLoad) -> float:
    tokens = (load.num_decode, load.num_prompt, load.num_adapted_decode, load.num_adapted_prompt)
    fixed, *each = MACHINE.values()
    return fixed + sum(count * cost for count, cost in zip(tokens, each, strict=True))


def random_load(rng: random.Random) -> StepLoad:
    decode, prompt = rng.randint(1, 16), rng.choice([0, 0, 64, 200])
    is_adapted = rng.random() < 0.5
    return StepLoad(decode, prompt, decode * is_adapted, prompt * is_adapted)


def learned(noise: float, num_steps: int = 1000) -> StepCosts:
    rng, costs = random.Random(1), StepCosts()
    for _ in range(num_steps):
        load = random_load(rng)
        hiccup = 8 if rng.random() < 0.01 * (noise > 0) else 1
        costs.observe(load, hiccup * seconds_of(load) * rng.uniform(1 - noise, 1 + noise))
    return costs


def test_the_coefficients_of_a_machine_are_found() -> None:
    costs = learned(noise=0)
    assert costs.is_known
    assert costs.coefficients == pytest.approx(MACHINE, rel=0.02)


def test_noise_and_hiccups_hardly_move_a_prediction() -> None:
    costs, rng = learned(noise=0.1), random.Random(2)
    for load in (random_load(rng) for _ in range(50)):
        assert costs.predict(load) == pytest.approx(seconds_of(load), rel=0.08)


def test_nothing_is_known_until_steps_of_both_kinds_were_seen() -> None:
    costs = StepCosts()
    for _ in range(10 * NEEDED_STEPS):
        costs.observe(StepLoad(8), seconds_of(StepLoad(8)))
    assert not costs.is_known
    adapted = StepLoad(8, 0, 8, 0)
    for _ in range(NEEDED_STEPS):
        costs.observe(adapted, seconds_of(adapted))
    assert costs.is_known


def test_of_steps_that_are_all_alike_everything_is_taken_as_fixed() -> None:
    """So nothing is split by a guess: two steps would cost twice as much."""
    costs, load = StepCosts(), StepLoad(8, 0, 8, 0)
    for _ in range(200):
        costs.observe(load, seconds_of(load))
    assert costs.predict(load) == pytest.approx(seconds_of(load), rel=0.02)
    assert costs.coefficients["fixed"] > 0.7 * seconds_of(load)


def test_what_recent_steps_say_nothing_about_stays_as_it_was() -> None:
    costs = learned(noise=0)
    for _ in range(5000):
        costs.observe(StepLoad(16), seconds_of(StepLoad(16)))
    for name in ("adapted decode", "adapted prompt", "prompt"):
        assert costs.coefficients[name] == pytest.approx(MACHINE[name], rel=0.3)


def test_a_machine_that_changes_is_learned_anew() -> None:
    costs, rng = learned(noise=0), random.Random(3)
    for _ in range(2000):
        load = random_load(rng)
        costs.observe(load, 3 * seconds_of(load))
    assert costs.predict(StepLoad(16)) == pytest.approx(3 * seconds_of(StepLoad(16)), rel=0.15)


def test_no_cost_is_negative() -> None:
    costs, rng = StepCosts(), random.Random(4)
    for _ in range(500):
        load = random_load(rng)
        costs.observe(load, 0.01 * rng.uniform(0.2, 5))
    assert min(costs.coefficients.values()) >= 0


def test_a_fixed_part_that_once_looked_like_nothing_is_found_again() -> None:
    costs, rng = StepCosts(), random.Random(5)
    for _ in range(300):  # steps that seem to cost by the token alone
        load = random_load(rng)
        costs.observe(load, seconds_of(load) - MACHINE["fixed"])
    assert costs.coefficients["fixed"] < 1e-3
    for _ in range(3000):
        load = random_load(rng)
        costs.observe(load, seconds_of(load))
    assert costs.coefficients["fixed"] == pytest.approx(MACHINE["fixed"], rel=0.2)
