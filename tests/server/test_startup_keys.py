"""The first key in a file, and public addresses."""

import os
from pathlib import Path

import pytest
from quickchange_adapters.api_keys import KeyRecord, token_hash
from quickchange_adapters.catalog import Catalog, sqlite_url
from quickchange_adapters.key_catalog import KeyCatalog
from quickchange_server.admin_key_file import MIN_CHARS
from quickchange_server.config import ServerConfig, load_config
from quickchange_server.errors import ConfigInvalid
from quickchange_server.startup_keys import open_keyring
from quickchange_server.storage import is_new_catalog

SECRET = "0123456789abcdef" * 4


def write_key(folder: Path, content: bytes, mode: int = 0o600) -> Path:
    file = folder / "key"
    file.write_bytes(content)
    file.chmod(mode)
    return file


def config(folder: Path, **flags: object) -> ServerConfig:
    return load_config({"store": str(folder), **flags}, {})


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o440, 0o640])
def test_the_file_s_key_opens_everything(tmp_path: Path, mode: int) -> None:
    file = write_key(tmp_path, SECRET.encode() + b"\r\n", mode)
    keyring = open_keyring(config(tmp_path, admin_key_file=str(file), host="0.0.0.0"))
    principal = keyring.authenticate(SECRET)
    assert principal is not None
    assert (principal.tenant, "admin" in principal.scopes) == ("default", True)
    assert keyring.authenticate(SECRET + "\n") is None
    assert not keyring.is_open
    assert SECRET not in repr(vars(keyring))


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o602, 0o601, 0o777])
def test_a_file_that_others_can_open_is_refused(tmp_path: Path, mode: int) -> None:
    file = write_key(tmp_path, SECRET.encode(), mode)
    with pytest.raises(ConfigInvalid, match=rf"mode {mode:04o}.*chmod o-rwx") as caught:
        open_keyring(config(tmp_path, admin_key_file=str(file)))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"password", "8 characters"),
        (SECRET[: MIN_CHARS - 1].encode(), f"{MIN_CHARS - 1} characters"),
        (f"{SECRET}\n{SECRET}\n".encode(), "one line"),
        (f"{SECRET} {SECRET}".encode(), "without spaces"),
        ("é".encode() * 40, "printable ASCII"),
        (b"\x00" * 40, "printable ASCII"),
        (b"x" * 5000, "more than 4096 bytes"),
    ],
)
def test_a_file_without_a_good_key_is_refused(
    tmp_path: Path, content: bytes, sentence: str
) -> None:
    file = write_key(tmp_path, content)
    with pytest.raises(ConfigInvalid, match=sentence) as caught:
        open_keyring(config(tmp_path, admin_key_file=str(file)))
    assert str(caught.value).startswith(f"--admin-key-file {file}: ")
    assert SECRET not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_folder_or_nothing_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ConfigInvalid, match="cannot be read"):
            open_keyring(config(tmp_path, admin_key_file=str(path)))


def test_a_key_may_come_through_a_pipe(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, SECRET.encode())
    os.close(writer)
    keyring = open_keyring(config(tmp_path, admin_key_file=f"/dev/fd/{reader}"))
    os.close(reader)
    assert keyring.authenticate(SECRET) is not None


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_key(host: str, tmp_path: Path) -> None:
    assert open_keyring(config(tmp_path, host=host)).is_open


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org"])
def test_public_address_without_keys_needs_insecure(host: str, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ConfigInvalid, match="--admin-key-file FILE, or .*--insecure"):
            open_keyring(config(folder, host=host))
    assert open_keyring(config(tmp_path, host=host, insecure=True)).is_open


def test_a_public_address_where_nothing_was_kept_yet_has_no_key(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    with pytest.raises(ConfigInvalid, match="no key is configured"):
        open_keyring(config(folder, host="0.0.0.0"))
    assert not folder.exists()


def test_a_catalog_s_url_may_end_in_a_query(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "catalog.sqlite") + "?timeout=30"
    assert is_new_catalog(url)
    Catalog(url)
    assert not is_new_catalog(url)


def test_public_address_with_a_key_in_the_catalog_needs_nothing_else(tmp_path: Path) -> None:
    catalog = Catalog(sqlite_url(tmp_path / "catalog.sqlite"))
    keys = KeyCatalog(catalog.database)
    record = KeyRecord("a" * 16, "default", token_hash("x"), ("admin",), None, "", 0)
    keys.create(record, has_other_admin=False)
    open_keyring(config(tmp_path, host="0.0.0.0"))
    keys.revoke(record.id, tenant=None, actor="", has_other_admin=True)
    with pytest.raises(ConfigInvalid, match="no key is configured"):
        open_keyring(config(tmp_path, host="0.0.0.0"))
    catalog.close()
