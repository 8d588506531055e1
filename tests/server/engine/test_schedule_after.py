"""The rows of a step behind one whose tokens are not known: who is in it, and who comes first."""

from quickchange_server.engine.scheduler import ScheduledRow, Scheduler
from quickchange_server.engine.sequence import Sequence

from tests.server.engine.scheduler_run import scheduler_of, sequence_of


def finish(scheduler: Scheduler, rows: list[ScheduledRow]) -> None:
    """Take a step's results: token 1 for everybody, and nobody ends."""
    for row in rows:
        scheduler.note_computed(row)
        if row.end == len(row.sequence.token_ids):
            row.sequence.token_ids.append(1)


def running(scheduler: Scheduler, *sequences: Sequence) -> list[ScheduledRow]:
    """Compute the prompts; return the rows of the first decode step, which runs."""
    for sequence in sequences:
        scheduler.add(sequence)
    finish(scheduler, scheduler.schedule().rows)
    return scheduler.schedule().rows


def test_rows_go_on_by_a_token_and_count_as_in_turn() -> None:
    scheduler, _ = scheduler_of()
    one, other = sequence_of(4, max_tokens=3), sequence_of(3, max_tokens=9, first=50)
    rows = running(scheduler, one, other)
    step = scheduler.schedule_after(rows)
    assert step is not None
    assert [(row.sequence, row.start, row.num_tokens) for row in step.rows] == [
        (one, 5, 1),
        (other, 4, 1),
    ]
    assert one.last_step == other.last_step == 3
    assert [len(sequence.blocks) for sequence in (one, other)] == [2, 2]
    assert len(step.fresh_blocks) == 1
    finish(scheduler, rows)
    finish(scheduler, step.rows)
    assert [each.num_computed for each in (one, other)] == [6, 5]
    scheduler.check_integrity()


def test_who_is_at_his_last_token_is_left_out() -> None:
    scheduler, _ = scheduler_of()
    ends, stays = sequence_of(4, max_tokens=2), sequence_of(3, max_tokens=9, first=50)
    step = scheduler.schedule_after(running(scheduler, ends, stays))
    assert step is not None
    assert [row.sequence for row in step.rows] == [stays]
    alone, _ = scheduler_of()
    assert alone.schedule_after(running(alone, sequence_of(4, max_tokens=2))) is None


def test_nothing_is_taken_where_blocks_are_too_few() -> None:
    scheduler, _ = scheduler_of(num_blocks=5)
    rows = running(scheduler, sequence_of(7, max_tokens=9), sequence_of(7, max_tokens=9, first=50))
    assert scheduler.blocks.num_free == 1
    assert scheduler.schedule_after(rows) is None
    assert all(len(row.sequence.blocks) == 2 for row in rows)
    scheduler.check_integrity()


def test_whoever_is_not_in_the_step_comes_first() -> None:
    scheduler, _ = scheduler_of()
    rows = running(scheduler, sequence_of(4, max_tokens=9), sequence_of(3, max_tokens=9, first=50))
    assert scheduler.schedule_after(rows[:1]) is None


def test_a_budget_that_shrank_is_kept() -> None:
    scheduler, _ = scheduler_of(max_step_tokens=8)
    rows = running(scheduler, sequence_of(4, max_tokens=9), sequence_of(3, max_tokens=9, first=50))
    scheduler._budget.shrink(2)
    assert scheduler.schedule_after(rows) is None


def test_who_waits_and_has_room_is_not_made_to_wait() -> None:
    scheduler, _ = scheduler_of()
    rows = running(scheduler, sequence_of(4, max_tokens=9))
    scheduler.add(sequence_of(3, first=50))
    assert scheduler.schedule_after(rows) is None


def test_who_waits_for_a_row_holds_nobody_up() -> None:
    scheduler, _ = scheduler_of(max_rows=2)
    running_rows = (sequence_of(4, max_tokens=9), sequence_of(3, max_tokens=9, first=50))
    rows = running(scheduler, *running_rows, sequence_of(3, first=80))
    assert len(scheduler.waiting) == 1
    assert scheduler.schedule_after(rows) is not None
    scheduler.add(sequence_of(3, first=90, tenant="other"))
    assert scheduler.schedule_after(rows) is None, "another tenant may be guaranteed a row"


def test_a_row_that_becomes_free_is_for_who_waits() -> None:
    scheduler, _ = scheduler_of(max_rows=2)
    running_rows = (sequence_of(4, max_tokens=2), sequence_of(3, max_tokens=9, first=50))
    rows = running(scheduler, *running_rows, sequence_of(3, first=80))
    assert scheduler.schedule_after(rows) is None


def test_who_waits_for_blocks_holds_nobody_up_as_long_as_they_are_too_few() -> None:
    scheduler, _ = scheduler_of(num_blocks=6)
    gone, stays = sequence_of(7, max_tokens=9), sequence_of(3, max_tokens=9, first=50)
    rows = running(scheduler, gone, stays, sequence_of(12, first=80))
    assert len(scheduler.waiting) == 1
    step = scheduler.schedule_after(rows)
    assert step is not None
    finish(scheduler, rows)
    scheduler.remove(gone)
    assert scheduler.schedule_after(step.rows) is None


def test_who_waits_for_a_slot_is_asked_for_in_every_other_step() -> None:
    scheduler, _ = scheduler_of(num_slots=1)
    rows = running(scheduler, sequence_of(4, ("a",), max_tokens=9), sequence_of(3, ("b",)))
    assert len(scheduler.waiting) == 1
    step = scheduler.schedule_after(rows)
    assert step is not None
    finish(scheduler, rows)
    assert scheduler.schedule_after(step.rows) is None
    finish(scheduler, step.rows)
    assert scheduler.schedule_after(scheduler.schedule().rows) is not None
