"""Settings: one meaning in three spellings, and errors that name what is wrong."""

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quickchange_server.config import (
    OPTIONS,
    ServerConfig,
    load_config,
    unknown_variables,
)
from quickchange_server.errors import ConfigInvalid
from quickchange_server.option import StaticAdapter, read_bytes

# What each setting looks like as text, as a TOML value, and what it means.
SAMPLES: dict[str, tuple[str, str, object]] = {
    "model": ("org/name", '"org/name"', "org/name"),
    "served_model_name": ("tiny", '"tiny"', "tiny"),
    "revision": ("main", '"main"', "main"),
    "device": ("cuda:1", '"cuda:1"', "cuda:1"),
    "dtype": ("float32", '"float32"', "float32"),
    "max_model_len": ("512", "512", 512),
    "cache": ("/some/cache", '"/some/cache"', Path("/some/cache")),
    "adapter": ("a=/x", '["a=/x"]', (StaticAdapter("a", Path("/x")),)),
    "store": ("/some/store", '"/some/store"', Path("/some/store")),
    "catalog": ("sqlite:///c.db", '"sqlite:///c.db"', "sqlite:///c.db"),
    "store_cache_bytes": ("5GiB", '"5GiB"', 5 << 30),
    "max_lora_rank": ("64", "64", 64),
    "kv_cache_bytes": ("2GiB", '"2GiB"', 2 << 30),
    "adapter_device_bytes": ("512MiB", '"512MiB"', 512 << 20),
    "adapter_host_bytes": ("1000", "1000", 1000),
    "merged_bytes": ("0", "0", 0),
    "max_batch_rows": ("7", "7", 7),
    "kernels": ("plain", '"plain"', "plain"),
    "amx": ("off", '"off"', "off"),
    "quantize": ("int8", '"int8"', "int8"),
    "max_step_tokens": ("99", "99", 99),
    "max_queue": ("0", "0", 0),
    "host": ("localhost", '"localhost"', "localhost"),
    "port": ("8123", "8123", 8123),
    "admin_port": ("9000", "9000", 9000),
    "drain_timeout": ("1.5", "1.5", 1.5),
    "strict_fields": ("true", "true", True),
    "cors_origin": ("https://a.example", '["https://a.example"]', ("https://a.example",)),
    "tenant_max_bytes": ("2GiB", '"2GiB"', 2 << 30),
    "tenant_max_versions": ("20", "20", 20),
    "tenant_uploads_per_minute": ("6", "6", 6),
    "tenant_max_uploads": ("2", "2", 2),
    "tenant_max_requests": ("40", "40", 40),
    "tenant_loads_per_minute": ("30", "30", 30),
    "event_days": ("30", "30", 30),
    "events_per_adapter": ("500", "500", 500),
    "admin_key_file": ("/keys/first", '"/keys/first"', Path("/keys/first")),
    "insecure": ("true", "true", True),
    "enable_lora": ("true", "true", True),
    "lora_modules": ("b=/y", '{b = "/y"}', (StaticAdapter("b", Path("/y")),)),
    "auto_merge": ("true", "true", True),
    "drain_delay": ("5", "5.0", 5.0),
    "log_level": ("debug", '"debug"', "debug"),
    "log_format": ("json", '"json"', "json"),
    "log_prompts": ("true", "true", True),
    "otlp_endpoint": ("http://c:4318", '"http://c:4318"', "http://c:4318"),
    "lora_root": ("/srv/a", '["/srv/a"]', (Path("/srv/a"),)),
    "max_loras": ("3", "3", 3),
    "max_cpu_loras": ("9", "9", 9),
}


def write_toml(folder: Path, text: str) -> Path:
    """Write a settings file and return it."""
    file = folder / "serve.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_every_setting_has_a_sample() -> None:
    assert set(SAMPLES) == set(OPTIONS)


@pytest.mark.parametrize("name", SAMPLES)
def test_flag_variable_and_file_mean_the_same(name: str, tmp_path: Path) -> None:
    text, toml, meaning = SAMPLES[name]
    flag_value = [text] if OPTIONS[name].kind == "list" else text
    by_flag = load_config({name: flag_value}, {})
    by_variable = load_config({}, {f"QUICKCHANGE_{name.upper()}": text})
    by_file = load_config({"config": write_toml(tmp_path, f"{name} = {toml}")}, {})
    assert getattr(by_flag, name) == meaning
    assert by_flag == by_variable == by_file


def test_flag_wins_over_variable_over_file_over_default(tmp_path: Path) -> None:
    file = write_toml(tmp_path, "max_queue = 1\nmax_batch_rows = 1\nport = 1")
    environ = {"QUICKCHANGE_MAX_QUEUE": "2", "QUICKCHANGE_MAX_BATCH_ROWS": "2"}
    config = load_config({"config": str(file), "max_queue": "3", "port": None}, environ)
    assert (config.max_queue, config.max_batch_rows, config.port) == (3, 2, 1)
    assert config.max_step_tokens == ServerConfig().max_step_tokens


def test_variable_names_the_file(tmp_path: Path) -> None:
    file = write_toml(tmp_path, "port = 8123")
    assert load_config({}, {"QUICKCHANGE_CONFIG": str(file)}).port == 8123


def test_empty_variable_counts_as_not_set() -> None:
    assert load_config({}, {"QUICKCHANGE_PORT": ""}) == ServerConfig()


def test_unknown_toml_key_is_an_error_that_names_the_nearest(tmp_path: Path) -> None:
    file = write_toml(tmp_path, "max_qeue = 1")
    with pytest.raises(ConfigInvalid, match=r"'max_qeue' \(nearest: max_queue\)"):
        load_config({"config": file}, {})


@pytest.mark.parametrize("text", ["port = ", "[", "\x00"])
def test_file_that_is_not_toml_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="is not TOML"):
        load_config({"config": write_toml(tmp_path, text)}, {})


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="cannot be read"):
        load_config({"config": tmp_path / "none.toml"}, {})


def test_unknown_variable_is_a_warning_with_the_nearest_name() -> None:
    environ = {"QUICKCHANGE_MAX_QEUE": "1", "PATH": "/bin"}
    assert unknown_variables(environ) == [
        "the variable QUICKCHANGE_MAX_QEUE is not known (nearest: QUICKCHANGE_MAX_QUEUE)"
    ]


def test_known_variables_of_server_and_client_give_no_warning() -> None:
    names = [option.variable for option in OPTIONS.values()]
    names += ["QUICKCHANGE_CONFIG", "QUICKCHANGE_URL", "QUICKCHANGE_API_KEY"]
    assert unknown_variables(dict.fromkeys(names, "x")) == []


# What Kubernetes sets in every pod when a Service is called `quickchange` or `quickchange-cache`.
SERVICE_LINKS = {
    "QUICKCHANGE_SERVICE_HOST": "10.0.0.1",
    "QUICKCHANGE_SERVICE_PORT": "8000",
    "QUICKCHANGE_SERVICE_PORT_HTTP": "8000",
    "QUICKCHANGE_PORT": "tcp://10.0.0.1:8000",
    "QUICKCHANGE_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "QUICKCHANGE_PORT_8000_TCP_PROTO": "tcp",
    "QUICKCHANGE_PORT_8000_TCP_PORT": "8000",
    "QUICKCHANGE_PORT_8000_TCP_ADDR": "10.0.0.1",
    "QUICKCHANGE_CACHE_SERVICE_HOST": "10.0.0.2",
    "QUICKCHANGE_CACHE_PORT": "tcp://10.0.0.2:80",
}


def test_service_links_of_kubernetes_are_neither_read_nor_warned_about() -> None:
    assert load_config({}, SERVICE_LINKS) == ServerConfig()
    assert unknown_variables(SERVICE_LINKS) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "65536"),
        ("port", "-1"),
        ("port", True),
        ("port", 80.5),
        ("max_batch_rows", "0"),
        ("max_queue", "many"),
        ("max_model_len", "0"),
        ("kv_cache_bytes", "2 gibs"),
        ("kv_cache_bytes", -5),
        ("kv_cache_bytes", "-5"),
        ("device", "tpu"),
        ("dtype", "int8"),
        ("drain_timeout", "soon"),
        ("drain_timeout", float("nan")),
        ("strict_fields", "perhaps"),
        ("enable_lora", False),
        ("model", ""),
        ("adapter", ["no-folder"]),
        ("adapter", ["Upper=/x"]),
        ("adapter", ["a="]),
        ("adapter", ["../a=/x"]),
        ("adapter", 3),
        ("lora_modules", ['{"name": "a"}']),
        ("lora_modules", ["{nonsense"]),
        ("cors_origin", 3),
        ("store", "https://host/path"),
        ("store", "memory://x"),
        ("store", "s3://"),
        ("store", "s3://key:secret@bucket/prefix"),
        ("store_cache_bytes", "much"),
        ("catalog", "mysql://host/db"),
        ("catalog", "/a/path"),
        ("catalog", ["sqlite:///x"]),
    ],
)
def test_malformed_value_is_refused_by_its_flag(name: str, value: object) -> None:
    with pytest.raises(ConfigInvalid, match="^--" + name.replace("_", "-") + " "):
        load_config({name: value}, {})


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("2GiB", 2 << 30),
        ("2Gi", 2 << 30),
        ("512 MiB", 512 << 20),
        ("1.5gib", 3 << 29),
        ("2GB", 2_000_000_000),
        ("7b", 7),
        ("1k", 1000),
    ],
)
def test_bytes(text: str, size: int) -> None:
    assert read_bytes(text) == size


@given(st.integers(min_value=0, max_value=10**18 - 1))
def test_bytes_of_a_plain_number_are_exact(size: int) -> None:
    assert read_bytes(str(size)) == read_bytes(size) == size


@given(st.text())
def test_any_text_is_bytes_or_a_value_error(text: str) -> None:
    with suppress(ValueError):
        assert read_bytes(text) >= 0


def test_adapters_in_all_forms_that_callers_use() -> None:
    wanted = (StaticAdapter("a", Path("/x")), StaticAdapter("b", Path("/y=z")))
    forms: list[object] = [
        ["a=/x", "b=/y=z"],
        "a=/x,b=/y=z",
        "a=/x b=/y=z",
        {"a": "/x", "b": "/y=z"},
        ['{"name": "a", "path": "/x"}', '{"name": "b", "path": "/y=z", "base_model_name": "m"}'],
    ]
    for form in forms:
        assert load_config({"lora_modules": form}, {}).static_adapters == wanted


def test_folder_of_an_adapter_may_hold_commas_and_spaces() -> None:
    (adapter,) = load_config({"adapter": ["a=/x, y/z"]}, {}).adapter
    assert adapter.folder == Path("/x, y/z")


def test_catalog_lies_in_the_store_unless_it_is_named() -> None:
    config = load_config({"store": "file:///data"}, {})
    assert config.store_folder == Path("/data")
    assert config.catalog_url == "sqlite:////data/catalog.sqlite"
    assert load_config({"catalog": "sqlite:///x.db"}, {}).catalog_url == "sqlite:///x.db"


def test_an_object_store_has_a_catalog_and_a_cache_of_its_own() -> None:
    configs = [
        load_config({"store": url, "cache": "/cache"}, {})
        for url in ("s3://bucket/a", "s3://bucket/a/", "s3://bucket/b")
    ]
    assert [config.store_url for config in configs] == ["s3://bucket/a"] * 2 + ["s3://bucket/b"]
    first, same, other = (config.catalog_url for config in configs)
    assert first == same != other
    assert Path(first.removeprefix("sqlite:///")).parent == configs[0].store_folder
    assert configs[0].store_cache_folder != configs[2].store_cache_folder
    assert configs[0].store_cache_folder.parent == Path("/cache/store")
    assert load_config({"store": "/folder"}, {}).store_url is None
    named = load_config({"store": "s3://bucket", "catalog": "postgresql://host/db"}, {})
    assert named.catalog_url == "postgresql://host/db"


def test_credentials_in_the_url_of_a_store_are_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigInvalid) as caught:
        load_config({"store": "s3://key:s3cret@bucket/prefix"}, {})
    assert "s3cret" not in str(caught.value)


def test_the_password_of_a_catalog_is_never_repeated() -> None:
    url = "postgresql://quick:s3cret@db.example/catalog"
    config = load_config({"catalog": url}, {})
    assert config.catalog_url == url
    assert "s3cret" not in repr(config)
    for wrong in (url.replace("postgresql", "mysql"), [url], {"url": url}):
        with pytest.raises(ConfigInvalid) as caught:
            load_config({"catalog": wrong}, {})
        assert "s3cret" not in str(caught.value)


def test_one_name_for_two_adapters_is_refused() -> None:
    with pytest.raises(ConfigInvalid, match="'a' twice"):
        load_config({"adapter": ["a=/x"], "lora_modules": ["a=/y"]}, {})


def test_adapter_cannot_take_the_name_of_the_base() -> None:
    with pytest.raises(ConfigInvalid, match="is the base's name"):
        load_config({"adapter": ["smollm2-135m=/x"]}, {})


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("builtin:smollm2-135m", "smollm2-135m"),
        ("org/Model-1B", "Model-1B"),
        ("/models/llama/", "llama"),
    ],
)
def test_base_is_called_by_the_last_part_of_its_path(model: str, name: str) -> None:
    assert ServerConfig(model=model).base_name == name
    assert ServerConfig(model=model, served_model_name="x").base_name == "x"


def test_origins_are_those_that_browsers_send() -> None:
    given = "https://A.example/,http://b:3000,https://c:443,http://d:80/,http://e:443"
    found = load_config({"cors_origin": given}, {}).cors_origin
    assert found == ("https://a.example", "http://b:3000", "https://c", "http://d", "http://e:443")
    for wrong in ("*", "foo", "a.example", "https://*.example", "https://a/b", "null", "https://"):
        with pytest.raises(ConfigInvalid, match="must name origins such as"):
            load_config({"cors_origin": wrong}, {})


def test_two_listeners_need_two_ports() -> None:
    with pytest.raises(ConfigInvalid, match="--admin-port 8000 is also --port"):
        load_config({"admin_port": "8000"}, {})
    assert load_config({"admin_port": "0", "port": "0"}, {}).admin_port == 0
