"""When traffic has an adapter merged and unmerged: by what a copy saves, with hysteresis."""

import random

import pytest
from quickchange_server.auto_merge_rule import (
    DWELL_S,
    IDLE_S,
    MERGE_AT,
    UNMERGE_AT,
    AutoMergeRule,
    Decision,
)
from quickchange_server.engine.copy_demand import CopyUse, Demand


def run(
    rule: AutoMergeRule, until_s: float, savings: dict[str, float], *, share: float = 0.9
) -> None:
    """Let a busy server run up to a time; `savings`: of its time, what each copy would save."""
    while rule._noted_at_s < until_s:
        copies = {digest: CopyUse(500 * share, saving) for digest, saving in savings.items()}
        rule.note(Demand(1.0, 500, copies), rule._noted_at_s + 1)


def decided(rule: AutoMergeRule, *merged: str) -> list[tuple[str, str, str]]:
    decisions = rule.decide(frozenset(merged), rule._noted_at_s)
    return [(each.kind, each.digest, each.reason) for each in decisions]


def test_a_copy_that_saves_enough_is_wanted_the_best_first() -> None:
    rule = AutoMergeRule()
    run(rule, 30, {"a": 0.05, "b": 0.09, "c": MERGE_AT / 2})
    assert decided(rule) == [("merge", "b", "hot"), ("merge", "a", "hot")]


def test_between_the_two_marks_everything_stays_as_it_is() -> None:
    for saving in (UNMERGE_AT * 1.1, MERGE_AT * 0.9):
        rule = AutoMergeRule()
        run(rule, 30, {"a": saving})
        assert decided(rule) == decided(rule, "a") == []


def test_what_cools_is_unmerged_once_the_heat_is_forgotten() -> None:
    rule = AutoMergeRule()
    run(rule, 100, {"a": 0.09})
    assert decided(rule, "a") == []
    run(rule, 160, {"b": 0.001})
    assert decided(rule, "a") == []
    run(rule, 360, {"b": 0.001})
    assert decided(rule, "a") == [("unmerge", "a", "cold")]


def test_a_change_holds_for_a_while_whatever_the_traffic_does() -> None:
    rule = AutoMergeRule()
    run(rule, 100, {"a": 0.09})
    run(rule, 400, {"b": 0.0})
    rule.note_change("a", 400)
    run(rule, 400 + DWELL_S - 1, {"b": 0.0})
    assert decided(rule, "a") == []
    run(rule, 400 + DWELL_S, {"b": 0.0})
    assert decided(rule, "a") == [("unmerge", "a", "cold")]
    assert decided(rule) == []


def test_traffic_that_swings_back_and_forth_changes_each_adapter_once_a_minute_at_most() -> None:
    rule, merged, num_changes = AutoMergeRule(), set[str](), 0
    for second in range(0, 1200, 5):
        hot, cold = ("a", "b") if second // 20 % 2 else ("b", "a")
        run(rule, second, {hot: 0.09, cold: 0.0})
        for each in rule.decide(frozenset(merged), second):
            merged ^= {each.digest}
            rule.note_change(each.digest, second)
            num_changes += 1
    assert num_changes <= 2 * 1200 / DWELL_S


@pytest.mark.parametrize("request_s", [0.7, 2.0, 5.0])
def test_one_client_that_asks_for_four_at_random_does_not_have_them_merged_to_and_fro(
    request_s: float,
) -> None:
    rule, rng, merged, num_changes = AutoMergeRule(), random.Random(3), set[str](), 0
    asked, next_at_s = None, 0.0
    for tick in range(2 * 3600):
        now_s = tick / 2
        while next_at_s <= now_s:
            asked, next_at_s = rng.choice([None, "a", "b", "c"]), next_at_s + request_s
        copies = {} if asked is None else {asked: CopyUse(45, 0.09 * 0.5)}
        rule.note(Demand(0.5, 45, copies), now_s)
        for each in rule.decide(frozenset(merged), now_s)[:1]:
            merged ^= {each.digest}
            rule.note_change(each.digest, now_s)
            num_changes += 1
    assert 1 <= num_changes <= 24


def test_a_server_that_hardly_runs_says_nothing() -> None:
    rule = AutoMergeRule()
    rule.note(Demand(0.5, 100, {"a": CopyUse(100, 0.05)}), 1)
    assert decided(rule) == []


def test_a_copy_that_nobody_uses_goes_although_nothing_else_runs() -> None:
    rule = AutoMergeRule()
    run(rule, 30, {"a": 0.09})
    rule.note(Demand(), 30 + IDLE_S - 1)
    assert decided(rule, "a") == []
    rule.note(Demand(), 30 + IDLE_S)
    assert decided(rule, "a") == [("unmerge", "a", "idle")]


def test_the_break_even_share_follows_from_what_deltas_cost() -> None:
    assert Decision("merge", "a", "hot", 0.8, 0.08).break_even == pytest.approx(0.3)
    rule = AutoMergeRule()
    run(rule, 30, {"a": 0.08}, share=0.8)
    (decision,) = rule.decide(frozenset(), 30)
    assert [decision.share, decision.saving] == pytest.approx([0.8, 0.08])


def test_thousands_of_adapters_leave_nothing_behind() -> None:
    rule = AutoMergeRule()
    for number in range(3000):
        rule.note(Demand(1.0, 10, {f"a{number}": CopyUse(10, 0.0)}), number)
    assert len(rule._recent.copies) < 1000
    assert len(rule._used_at_s) < 1000
