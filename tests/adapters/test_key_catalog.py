"""Keys in the catalog: what is kept, who must be able to make more, and two changes at once."""

import threading
from typing import Any

import pytest
from quickchange_adapters.api_keys import KeyRecord, new_token, token_hash, token_id
from quickchange_adapters.catalog import Catalog
from quickchange_adapters.errors import AdminKeyNeeded, LastAdminKey, NotInCatalog
from quickchange_adapters.key_catalog import KeyCatalog

from tests.adapters.conftest import Clock


@pytest.fixture
def keys(catalog: Catalog, clock: Clock) -> KeyCatalog:
    return KeyCatalog(catalog.database, clock)


def a_key(*scopes: Any, **changes: Any) -> KeyRecord:
    token = new_token()
    values: dict[str, Any] = {
        "id": token_id(token),
        "tenant": "default",
        "secret_hash": token_hash(token),
        "scopes": scopes,
        "adapters": None,
        "name": "n",
        "created_at": 0,
    }
    return KeyRecord(**{**values, **changes})


def create(keys: KeyCatalog, record: KeyRecord, *, has_file: bool = False) -> KeyRecord:
    return keys.create(record, has_other_admin=has_file)


def revoke(keys: KeyCatalog, key_id: str, *, has_file: bool = False) -> KeyRecord:
    return keys.revoke(key_id, tenant=None, actor="me", has_other_admin=has_file)


def test_tokens_carry_an_id_and_enough_randomness() -> None:
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100
    assert all(len(token_id(token) or "") == 16 for token in tokens)
    assert all(len(token) == 63 for token in tokens)
    (token, *_) = tokens
    for other in ("", token[:-1], token + "x", token.upper(), "qc--", token.replace("-", "_")):
        assert token_id(other) is None


def test_keys_come_back_as_they_were_made(keys: KeyCatalog) -> None:
    admin = create(keys, a_key("admin", "generate"))
    limited = create(keys, a_key("generate", adapters=("a", "b"), created_by=admin.id, tenant="x"))
    assert admin.created_at == 1_000_000
    assert sorted(keys.list_keys(), key=lambda key: key.id) == sorted(
        (admin, limited), key=lambda key: key.id
    )


def test_every_change_is_news(keys: KeyCatalog, catalog: Catalog) -> None:
    seen = [catalog.revision()]
    admin = create(keys, a_key("admin"))
    seen.append(catalog.revision())
    other = create(keys, a_key("admin"))
    seen.append(catalog.revision())
    revoke(keys, other.id)
    seen.append(catalog.revision())
    assert seen == sorted(set(seen))
    revoke(keys, other.id)
    with pytest.raises(LastAdminKey):
        revoke(keys, admin.id)
    assert catalog.revision() == seen[-1]


@pytest.mark.parametrize(
    "first", [a_key("generate"), a_key("adapters:write", "metrics"), a_key("admin", tenant="x")]
)
def test_the_first_key_must_be_able_to_make_others(keys: KeyCatalog, first: KeyRecord) -> None:
    with pytest.raises(AdminKeyNeeded):
        create(keys, first)
    assert keys.list_keys() == []
    assert create(keys, first, has_file=True).id == first.id


def test_after_an_admin_key_any_other_may_follow(keys: KeyCatalog) -> None:
    create(keys, a_key("admin"))
    create(keys, a_key("generate"))


def test_the_last_admin_key_stays_unless_a_file_has_another(keys: KeyCatalog) -> None:
    admin, other = create(keys, a_key("admin")), create(keys, a_key("admin", "metrics"))
    create(keys, a_key("admin", tenant="x"))
    create(keys, a_key("generate"))
    revoke(keys, other.id)
    with pytest.raises(LastAdminKey, match="--admin-key-file"):
        revoke(keys, admin.id)
    assert revoke(keys, admin.id, has_file=True).revoked_at == 1_000_000


def test_a_key_is_revoked_once_and_kept(keys: KeyCatalog) -> None:
    create(keys, a_key("admin"))
    key = create(keys, a_key("generate"))
    gone = revoke(keys, key.id)
    assert (gone.revoked_at, gone.revoked_by) == (1_000_000, "me")
    assert keys.revoke(key.id, tenant=None, actor="you", has_other_admin=False) == gone
    assert gone in keys.list_keys()


def test_another_tenant_s_key_is_unknown(keys: KeyCatalog) -> None:
    create(keys, a_key("admin"))
    key = create(keys, a_key("generate", tenant="x"))
    messages = []
    for tenant, key_id in (("y", key.id), ("x", "0" * 16)):
        with pytest.raises(NotInCatalog) as caught:
            keys.revoke(key_id, tenant=tenant, actor="", has_other_admin=False)
        messages.append(str(caught.value).replace(key_id, "ID"))
    assert len(set(messages)) == 1
    assert keys.revoke(key.id, tenant="x", actor="", has_other_admin=False).revoked_at


@pytest.mark.parametrize("key_id", ["", "x", "\x00", "0" * 17, "\ud800", "0" * 5000, "A" * 16])
def test_what_is_no_id_is_no_key(keys: KeyCatalog, key_id: str) -> None:
    with pytest.raises(NotInCatalog):
        revoke(keys, key_id)


def test_two_admins_that_revoke_each_other_leave_one(keys: KeyCatalog) -> None:
    left = [create(keys, a_key("admin")).id]
    for _ in range(10):
        pair = [create(keys, a_key("admin")).id for _ in range(2)]
        revoke(keys, left.pop())

        def end(key_id: str) -> None:
            try:
                revoke(keys, key_id)
            except LastAdminKey:
                left.append(key_id)

        threads = [threading.Thread(target=end, args=(key_id,)) for key_id in pair]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [key.id for key in keys.list_keys() if not key.revoked_at] == left
        assert len(left) == 1
