"""API keys from Python and from the shell, against the real routes and a real catalog."""

import json
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from quickchange_adapters.api_keys import token_hash
from quickchange_adapters.catalog import Catalog, sqlite_url
from quickchange_adapters.key_catalog import KeyCatalog
from quickchange_client import (
    AsyncQuickchange,
    Conflict,
    Forbidden,
    InvalidApiKey,
    InvalidRequest,
    NotFound,
    Quickchange,
)
from quickchange_server.api.app import AppServices, create_app
from quickchange_server.key_service import KeyService
from quickchange_server.keyring import Keyring
from quickchange_server.metrics import ServerMetrics
from quickchange_server.tokenizer import Tokenizer
from starlette.responses import JSONResponse

from tests.clients.app_thread import AppSlot
from tests.clients.conftest import RunCommand
from tests.clients.fake_server import FakeServer, refusal
from tests.server.scripted_adapters import ScriptedAdapters
from tests.server.scripted_engine import ScriptedEngine

ADMIN = "a" * 40


def make_app(base: Path, folder: Path, keyring: Keyring) -> FastAPI:
    """Return an app whose keys are kept in a catalog in `folder`."""
    keys = KeyService(KeyCatalog(Catalog(sqlite_url(folder / "keys.db")).database), keyring)
    services = AppServices(
        ScriptedEngine(),
        ScriptedAdapters({"ada": "a" * 64}),
        Tokenizer.load(base),
        ServerMetrics(),
        keyring=keyring,
        keys=keys,
    )
    return create_app(services)


@pytest.fixture
def keyed_app(tiny_base: Path, tmp_path: Path) -> FastAPI:
    """Return an app with an admin key file."""
    return make_app(tiny_base, tmp_path, Keyring(token_hash(ADMIN)))


@pytest.fixture
def url(app_socket: tuple[AppSlot, str], keyed_app: FastAPI) -> str:
    """Return the address of that app on a real socket."""
    slot, url = app_socket
    slot.app = keyed_app
    return url


def test_life_of_a_key(url: str) -> None:
    with Quickchange(url, api_key=ADMIN) as admin:
        key = admin.keys.create(name="web shop")
        assert (key.name, key.scopes, key.tenant) == ("web shop", ["generate"], "default")
        assert key.adapters is None
        assert key.secret not in repr(key)
        with Quickchange(url, api_key=key.secret) as user:
            assert user.models.list().data
            with pytest.raises(Forbidden, match="'admin'"):
                user.keys.list()
            (listed,) = admin.keys.list().data
            assert listed.id == key.id
            assert "secret" not in listed.model_dump()
            assert admin.keys.revoke(key.id).revoked_at is not None
            with pytest.raises(InvalidApiKey):
                user.models.list()
        assert list(admin.keys.iterate()) == []
        assert [each.id for each in admin.keys.iterate(include_revoked=True)] == [key.id]


def test_wishes_are_sent_and_refusals_are_of_the_tree(url: str) -> None:
    with Quickchange(url, api_key=ADMIN) as admin:
        key = admin.keys.create(
            scopes=["generate", "adapters:read"], adapters=["ada"], tenant="acme"
        )
        assert (key.adapters, key.tenant) == (["ada"], "acme")
        with pytest.raises(InvalidRequest, match="adapters"):
            admin.keys.create(scopes=["admin"], adapters=["ada"])
        with pytest.raises(NotFound):
            admin.keys.revoke("0" * 16)
    with pytest.raises(InvalidApiKey), Quickchange(url, api_key="no") as nobody:
        nobody.keys.create()


def test_all_pages_are_walked(url: str) -> None:
    with Quickchange(url, api_key=ADMIN) as admin:
        made = {admin.keys.create().id for _ in range(23)}
        assert {key.id for key in admin.keys.iterate()} == made


async def test_async_keys(keyed_app: FastAPI) -> None:
    transport = httpx.ASGITransport(keyed_app)
    async with AsyncQuickchange("http://app", api_key=ADMIN, transport=transport) as admin:
        key = await admin.keys.create(name="x")
        assert [each.id async for each in admin.keys.iterate()] == [key.id]
        assert (await admin.keys.list(limit=1)).has_more is False
        assert (await admin.keys.revoke(key.id)).id == key.id


def test_the_shell_gets_the_key_and_nothing_else(run_command: RunCommand, url: str) -> None:
    def run(*words: str, key: str = ADMIN, code: int = 0) -> tuple[str, str]:
        result = run_command("keys", *words, "--url", url, QUICKCHANGE_API_KEY=key)
        assert result.exit_code == code, result.output
        return result.stdout, result.stderr

    secret, note = run("create", "--name", "ci", "--scope", "generate", "--scope", "admin")
    secret = secret.removesuffix("\n")
    assert secret.startswith("qc-")
    assert secret not in note
    assert "nobody can show it again" in note
    made = json.loads(run("create", "--adapter", "ada", "--json", key=secret)[0])
    assert (made["adapters"], made["scopes"]) == (["ada"], ["generate"])
    shown = run("list")[0]
    for word in ("ID", "ci", "ada", "generate, admin", made["id"]):
        assert word in shown
    assert secret not in shown
    assert run("revoke", made["id"])[0] == f"revoked {made['id']}\n"
    assert made["id"] not in run("list")[0]
    listed = json.loads(run("list", "--include-revoked", "--json")[0])
    good = {key["id"] for key in listed if key["revoked_at"] is None}
    assert (len(listed), good) == (2, {secret.split("-")[1]})
    assert "not known" in run("list", key=made["secret"], code=1)[1]


def test_wrong_words_are_wrong_usage_and_are_not_repeated(
    run_command: RunCommand, url: str
) -> None:
    secret = "qc-0123456789abcdef-secret"
    result = run_command("keys", "create", "--scope", secret, "--url", url)
    assert result.exit_code == 2
    assert "adapters:read" in result.stderr
    assert secret not in result.output


@pytest.mark.parametrize("command", ["create", "list", "revoke"])
def test_every_command_has_help_with_examples(run_command: RunCommand, command: str) -> None:
    result = run_command("keys", command, "--help")
    assert result.exit_code == 0
    assert f"quickchange keys {command}" in result.stdout.partition("Examples:")[2]
    assert "--json" in result.stdout


def test_the_first_key_needs_none_and_stays(
    app_socket: tuple[AppSlot, str], tiny_base: Path, tmp_path: Path
) -> None:
    slot, url = app_socket
    slot.app = make_app(tiny_base, tmp_path, Keyring())
    with Quickchange(url) as nobody:
        with pytest.raises(Conflict, match="admin"):
            nobody.keys.create()
        first = nobody.keys.create(scopes=["admin"])
        with pytest.raises(InvalidApiKey):
            nobody.models.list()
    with Quickchange(url, api_key=first.secret) as admin, pytest.raises(Conflict, match="last"):
        admin.keys.revoke(first.id)


def test_push_works_with_a_key_that_may_not_read(
    fake_server: FakeServer, run_command: RunCommand, adapter_folder: Path
) -> None:
    version = {"name": "sentiment", "version": 1, "digest": "d1" * 32}
    forbidden = refusal(403, "scope_missing", "this needs the scope 'adapters:read'")
    fake_server.next_answers.extend([JSONResponse(version, 201), forbidden])
    result = run_command("push", str(adapter_folder), "--name", "sentiment")
    assert result.exit_code == 0, result.output
    assert "uploaded sentiment:1" in result.stdout


def test_push_says_who_may_use_it(
    fake_server: FakeServer, run_command: RunCommand, adapter_folder: Path
) -> None:
    words = ("push", str(adapter_folder), "--name", "sentiment")
    assert run_command(*words).exit_code == 0
    assert run_command(*words, "--visibility", "public").exit_code == 0
    wrong = run_command(*words, "--visibility", "all")
    assert (wrong.exit_code, "public or private" in wrong.stderr) == (2, True)
    forms = [body for method, _, body in fake_server.requests if method == "POST"]
    assert [form.get("visibility") for form in forms] == [None, "public"]
