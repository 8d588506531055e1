"""What cannot be had is a reason, not an error."""

from pathlib import Path

import pytest

from tests.ops.environments import NotHere, debian_package


def test_a_package_that_cannot_be_had_says_why(tmp_path: Path) -> None:
    with pytest.raises(NotHere, match="apt-get download quickchange-no-such-package: "):
        debian_package("quickchange-no-such-package", "no-such-binary", tmp_path)
    assert not (tmp_path / "quickchange-no-such-package").exists()


def test_a_package_is_unpacked_once_into_its_folder(tmp_path: Path) -> None:
    try:
        folder = debian_package("hello", "hello", tmp_path)
    except NotHere as reason:
        pytest.skip(f"no package to try with: {reason}")
    made_s = (folder / "hello").stat().st_ctime
    assert debian_package("hello", "hello", tmp_path) == folder
    assert (folder / "hello").stat().st_ctime == made_s
