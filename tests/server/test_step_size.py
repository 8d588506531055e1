"""The default size of a step: by device, never too small for the rows."""

import pytest
from quickchange_server.step_size import default_step_tokens


@pytest.mark.parametrize(
    ("device", "rows", "tokens"),
    [("cpu", 1, 128), ("cpu", 32, 128), ("cpu", 256, 1024), ("cuda:1", 32, 2048)],
)
def test_default_step_tokens(device: str, rows: int, tokens: int) -> None:
    assert default_step_tokens(device, rows) == tokens
