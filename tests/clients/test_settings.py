"""Where the server is and which key to show it."""

import pytest
from quickchange_client.errors import ArgumentInvalid
from quickchange_client.settings import DEFAULT_URL, HubSettings, Settings


def test_arguments_win_over_variables_over_defaults() -> None:
    environ = {"QUICKCHANGE_URL": "http://there:1", "QUICKCHANGE_API_KEY": "from-there"}
    assert Settings.read(environ={}) == Settings(DEFAULT_URL, None)
    assert Settings.read(environ=environ) == Settings("http://there:1", "from-there")
    given = Settings.read("https://here", "from-here", environ)
    assert given == Settings("https://here", "from-here")


def test_empty_variables_are_none() -> None:
    environ = {"QUICKCHANGE_URL": "", "QUICKCHANGE_API_KEY": ""}
    assert Settings.read(environ=environ) == Settings(DEFAULT_URL, None)


@pytest.mark.parametrize("url", ["http://a:8/", "http://a:8/v1", "http://a:8/v1/", " http://a:8"])
def test_the_address_of_an_openai_client_works_too(url: str) -> None:
    assert Settings.read(url, environ={}).url == "http://a:8"


def test_a_path_before_the_api_is_kept() -> None:
    assert Settings.read("https://a/models/x/v1", environ={}).url == "https://a/models/x"


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a", "http://", "8000", "http://[::1"])
def test_what_is_no_address_is_refused_by_name(url: str) -> None:
    with pytest.raises(ArgumentInvalid, match="QUICKCHANGE_URL"):
        Settings.read(url, environ={})


def test_a_key_is_not_shown() -> None:
    assert "secret" not in repr(Settings("http://a", "secret"))


@pytest.mark.parametrize("key", ["sec\nret", "s\u00e9cret"])
def test_what_can_be_no_key_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(ArgumentInvalid, match="QUICKCHANGE_API_KEY") as caught:
        Settings.read(environ={"QUICKCHANGE_API_KEY": key})
    with pytest.raises(ArgumentInvalid, match="HF_TOKEN") as of_hub:
        HubSettings.read({"HF_TOKEN": key})
    assert "cret" not in f"{caught.value} {of_hub.value}"


def test_the_line_end_of_a_file_is_no_part_of_a_key() -> None:
    assert Settings.read(environ={"QUICKCHANGE_API_KEY": "secret\n"}).api_key == "secret"
