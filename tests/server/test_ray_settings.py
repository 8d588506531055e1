"""What the Ray application is built from, without Ray."""

from pathlib import Path

import pytest
from quickchange_server.errors import ConfigInvalid
from quickchange_server.ray_settings import RaySettings, read_settings


def test_a_fixed_number_of_replicas_needs_no_autoscaling() -> None:
    layout, config = read_settings({"min_replicas": "2", "max-batch-rows": "8"}, {})
    options = layout.engine_options(config)
    assert (options["num_replicas"], options["max_ongoing_requests"]) == (2, 16)
    assert "autoscaling_config" not in options


def test_more_at_most_than_at_least_is_autoscaling_that_aims_at_full_batches() -> None:
    layout, config = read_settings({"max_replicas": 4, "num_gpus": 1, "max_queue": 7}, {})
    options = layout.engine_options(config)
    scaling = options["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (1, 4)
    assert scaling["target_ongoing_requests"] == config.max_batch_rows
    assert options["max_queued_requests"] == 7
    assert options["ray_actor_options"] == {"num_cpus": 1.0, "num_gpus": 1.0}
    assert "num_replicas" not in options


def test_variables_are_read_where_the_application_is_built() -> None:
    _, config = read_settings({"max_queue": 3}, {"QUICKCHANGE_DTYPE": "float16"})
    assert (config.max_queue, config.dtype) == (3, "float16")


def test_folders_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    _, config = read_settings({"model": "base", "store": "kept", "adapter": ["a=b"]}, {})
    assert (config.model, config.base_name) == (str(tmp_path / "base"), "base")
    assert config.store == tmp_path / "kept"
    assert config.adapter[0].folder == tmp_path / "b"
    assert (
        read_settings({"model": "some/hub-id", "store": "s3://b/p"}, {})[1].model == "some/hub-id"
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"min_replica": 2}, "unknown setting 'min_replica' .nearest: min_replicas"),
        ({"port": 1}, "port is not for Ray: http_options"),
        ({"admin-port": 1}, "admin_port is not for Ray"),
        ({"min_replicas": 0}, "min_replicas 0 is not a whole number from 1 on"),
        ({"max_replicas": "two"}, "max_replicas 'two' is not a whole number from 0 on"),
        ({"num_gpus": "-1"}, "num_gpus '-1' is not a number from 0 on"),
        ({"num_cpus": "nan"}, "num_cpus 'nan' is not a number"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas is less than min_replicas"),
    ],
)
def test_what_is_wrong_is_said(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigInvalid, match=sentence):
        read_settings(arguments, {})


def test_the_front_is_never_what_requests_wait_for() -> None:
    layout, config = read_settings({"max_replicas": 3}, {})
    engines = 3 * layout.engine_options(config)["max_ongoing_requests"]
    assert layout.ingress_options(config)["max_ongoing_requests"] > engines + config.max_queue
    assert RaySettings().most_replicas == 1
