import asyncio

from quickchange_server.engine.output_line import OutputLine
from quickchange_server.engine.request import TokenOutput


def outputs(*request_ids: str) -> list[TokenOutput]:
    return [TokenOutput(request_id, (1,)) for request_id in request_ids]


async def test_others_have_their_turn_between_portions() -> None:
    seen: list[str] = []
    line = OutputLine(lambda output: seen.append(output.request_id), portion=4)
    line.put(outputs(*(f"r{number}" for number in range(12))))
    turns = []
    while len(seen) < 12:
        turns.append(len(seen))
        await asyncio.sleep(0)
    assert turns == [4, 8]
    assert seen == [f"r{number}" for number in range(12)]


async def test_the_next_step_s_outputs_come_behind_those_of_the_last() -> None:
    seen: list[str] = []
    line = OutputLine(lambda output: seen.append(output.request_id), portion=2)
    line.put(outputs("a1", "b1", "c1", "d1"))
    line.put(outputs("d2", "c2"))
    await asyncio.sleep(0)
    line.put(outputs("a3"))
    for _ in range(5):
        await asyncio.sleep(0)
    assert seen == ["a1", "b1", "c1", "d1", "d2", "c2", "a3"]


async def test_few_outputs_do_not_wait() -> None:
    seen: list[str] = []
    line = OutputLine(lambda output: seen.append(output.request_id), portion=4)
    line.put(outputs("a", "b"))
    assert seen == ["a", "b"]
    line.put(outputs("c"))
    assert seen == ["a", "b", "c"]
