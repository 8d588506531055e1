"""A stand-in for the Hugging Face Hub: one repository, whose large files lie on another host."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import httpx

REPO = "some-org/some-lora"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB, STORAGE = "http://hub.test", "http://storage.test"


@dataclass
class FakeHub:
    """Call it as the handler of a `MockTransport`; `seen` holds (URL, Authorization) pairs."""

    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main", "v1", "refs/pr/1")
    token: str | None = None
    sha256: str | None = None
    seen: list[tuple[str, str | None]] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        shown = request.headers.get("authorization")
        self.seen.append((str(request.url), shown))
        if f"{request.url.scheme}://{request.url.host}" == STORAGE:
            return httpx.Response(200, content=self.files[request.url.path.lstrip("/")])
        if self.token is not None and shown != f"Bearer {self.token}":
            return httpx.Response(401, json={"error": "Invalid username or password."})
        raw = request.url.raw_path.decode().partition("?")[0]
        for revision in self.revisions:
            quoted = revision.replace("/", "%2F")
            if raw == f"/api/models/{REPO}/revision/{quoted}":
                return httpx.Response(200, json=self._repository())
        head = f"/{REPO}/resolve/{COMMIT}/"
        if raw.startswith(head) and (name := raw.removeprefix(head)) in self.files:
            return self._file(name)
        return httpx.Response(404, json={"error": "not found"})

    def _repository(self) -> dict[str, Any]:
        return {"id": REPO, "sha": COMMIT, "siblings": [self._entry(name) for name in self.files]}

    def _entry(self, name: str) -> dict[str, Any]:
        data = self.files[name]
        entry: dict[str, Any] = {"rfilename": name, "size": len(data)}
        if name.endswith(".safetensors"):
            digest = self.sha256 or hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
        return entry

    def _file(self, name: str) -> httpx.Response:
        if name.endswith(".safetensors"):
            return httpx.Response(302, headers={"location": f"{STORAGE}/{name}"})
        return httpx.Response(200, content=self.files[name])
