"""A small local Ray that serves the application until it is told to stop. Runs in .ops/ray.

python tests/ops/ray_cluster.py PORT FOLDER NAME=VALUE …
"""

import signal
import sys
from threading import Event

import ray
from ray import serve

MIB = 1 << 20


def main(port: str, folder: str, *pairs: str) -> None:
    is_told = Event()
    ray.init(
        num_cpus=2,
        object_store_memory=100 * MIB,
        include_dashboard=False,
        _temp_dir=folder,
    )
    from quickchange_server.ray_app import build

    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    serve.run(build(dict(pair.split("=", 1) for pair in pairs)))
    for number in (signal.SIGTERM, signal.SIGINT):  # Ray's own would end this at once
        signal.signal(number, lambda *_: is_told.set())
    print("serving", flush=True)
    is_told.wait()
    serve.shutdown()
    ray.shutdown()
    print("stopped", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
