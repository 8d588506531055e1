import random

from quickchange_adapters.records import AdapterRecord
from quickchange_server.adapter_names import AdapterNames

from tests.server.adapter_records import adapter_record


def models(names: AdapterNames, digest: str, *, only_public: bool = False) -> list[str]:
    return sorted(names.models(digest, only_public=only_public))


def test_a_version_is_asked_for_by_name_alias_or_number() -> None:
    names = AdapterNames()
    aliases = {"default": 2, "blue": 2, "old": 1}
    names.note("default", "ada", adapter_record("ada", ["d1", "d2", "d3"], aliases))
    assert models(names, "d2") == ["ada", "ada@blue"]
    assert models(names, "d1") == ["ada@old"]
    assert models(names, "d3") == ["ada:3"]
    assert models(names, "d9") == []


def test_private_names_are_left_out_when_only_public_ones_are_wanted() -> None:
    names = AdapterNames()
    names.note("acme", "hers", adapter_record("hers", ["d"], tenant="acme"))
    names.note("default", "all", adapter_record("all", ["d"], visibility="public"))
    assert models(names, "d") == ["all", "hers"]
    assert models(names, "d", only_public=True) == ["all"]
    assert names.tenants == {"acme", "default"}
    names.note("acme", "hers", None)
    assert models(names, "d") == ["all"]
    assert names.tenants == {"default"}


def test_a_folder_s_adapter_shadows_the_catalog_s() -> None:
    names = AdapterNames()
    names.note_static(adapter_record("ada", ["folder"], visibility="public"))
    names.note("default", "ada", adapter_record("ada", ["catalog"]))
    assert models(names, "folder") == ["ada"]
    assert models(names, "catalog") == []
    names.note("default", "ada", None)
    assert models(names, "folder") == ["ada"]


def test_after_any_changes_it_is_as_if_made_anew() -> None:
    chance = random.Random(5)
    names, now = AdapterNames(), dict[str, AdapterRecord]()
    for _ in range(400):
        name = f"a{chance.randrange(12)}"
        if chance.random() < 0.3:
            names.note("default", name, None)
            now.pop(name, None)
        else:
            digests = [f"d{chance.randrange(6)}" for _ in range(chance.randrange(1, 4))]
            now[name] = adapter_record(name, digests)
            names.note("default", name, now[name])
    anew = AdapterNames()
    for name, record in now.items():
        anew.note("default", name, record)
    assert now
    for number in range(6):
        assert models(names, f"d{number}") == models(anew, f"d{number}")
        assert {m.partition(":")[0] for m in models(names, f"d{number}")} == {
            name
            for name, record in now.items()
            if any(v.digest == f"d{number}" for v in record.versions)
        }
    assert names.tenants == anew.tenants
