"""A server of this machine that speaks the Hugging Face hub's HTTP, as far as its client asks."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "t" * 34


class Hub:
    """Repositories in memory: what was sent, and every request that came."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.bodies: list[bytes] = []
        self.fail_next: list[tuple[str, int]] = []
        """Part of a path, and what the next request of it is answered."""
        self.closed = False
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.server.server_port}"

    def sha(self, name: str) -> str:
        """The commit of a repository."""
        files = self.repositories[name]
        whole = hashlib.sha1()
        for file in sorted(files):
            whole.update(file.encode() + hashlib.sha1(files[file]).digest())
        return whole.hexdigest()

    def close(self) -> None:
        """End it."""
        self.closed = True
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """In silence."""

    def _answer(self, code: int, value: Any = None, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        kind = "application/octet-stream" if isinstance(value, bytes) else "application/json"
        for name, one in {
            "Content-Type": kind, "Content-Length": str(len(data)), "X-Request-Id": "test",
            **{k.replace("_", "-"): v for k, v in headers.items()},
        }.items():  # fmt: skip
            self.send_header(name, one)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            data = b"".join(parts)
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.bodies.append(data)
        return data

    def _handle(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        if hub.closed:
            self.close_connection = True
            return
        hub.requests.append((self.command, path))
        body = self._body()
        for i, (part, code) in enumerate(hub.fail_next):
            if part in path:
                del hub.fail_next[i]
                self._answer(code, {"error": "not now"})
                return
        writes = self.command in ("POST", "PUT") and not path.startswith("/blob/")
        if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
            return
        for pattern, answer in ROUTES:
            found = re.fullmatch(pattern, f"{self.command} {path}")
            if found:
                answer(self, body, *found.groups())
                return
        self._answer(404, {"error": f"no such page: {path}"})

    do_GET = do_POST = do_PUT = do_HEAD = _handle

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization')}/{asked['name']}"
        if asked.get("organization") is None:
            name = asked["name"] if "/" in asked["name"] else f"me/{asked['name']}"
        if name in self.hub.repositories:
            self._answer(
                409, {"error": "You already created this model repo", "url": self.url(name)}
            )
            return
        self.hub.repositories[name] = {}
        self.hub.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
        self._answer(200, {"url": self.url(name), "name": name, "id": name})

    def url(self, name: str) -> str:
        return f"{self.hub.address}/{name}"

    def valid_yaml(self, _: bytes) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, name: str) -> None:
        files = json.loads(body)["files"]
        self._answer(200, {"files": [
            {"path": f["path"], "shouldIgnore": False,
             "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
            for f in files
        ]})  # fmt: skip

    def batch(self, body: bytes, name: str) -> None:
        objects = []
        for one in json.loads(body)["objects"]:
            found = {"oid": one["oid"], "size": one["size"], "authenticated": True}
            if one["oid"] not in self.hub.blobs:
                to = f"{self.hub.address}/blob/{one['oid']}"
                found["actions"] = {"upload": {"href": to, "header": {}}}
            objects.append(found)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def put_blob(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        self._answer(200, {})

    def commit(self, body: bytes, name: str) -> None:
        files = dict(self.hub.repositories[name])
        for line in body.decode().splitlines():
            one = json.loads(line)
            value = one["value"]
            if one["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif one["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        self.hub.repositories[name] = files
        sha = self.hub.sha(name)
        self._answer(200, {"commitUrl": f"{self.url(name)}/commit/{sha}", "commitOid": sha,
                           "success": True, "hookOutput": ""})  # fmt: skip

    def info(self, _: bytes, name: str, __: str | None = None) -> None:
        files = self.hub.repositories.get(name)
        if files is None:
            self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return
        siblings = [{"rfilename": f, "size": len(data)} for f, data in sorted(files.items())]
        self._answer(200, {"id": name, "modelId": name, "sha": self.hub.sha(name),
                           "private": self.hub.private[name], "siblings": siblings})  # fmt: skip

    def tree(self, _: bytes, name: str, __: str) -> None:
        files = self.hub.repositories[name]
        self._answer(200, [
            {"type": "file", "path": f, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for f, data in sorted(files.items())
        ])  # fmt: skip

    def resolve(self, _: bytes, name: str, __: str, file: str) -> None:
        data = self.hub.repositories.get(name, {}).get(file)
        if data is None:
            self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            return
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        self._answer(200, data, ETag=etag, X_Repo_Commit=self.hub.sha(name))


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, Any]] = [
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.valid_yaml),
    (rf"POST /api/models/{NAME}/preupload/main", _Handler.preupload),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /blob/(\w+)", _Handler.put_blob),
    (rf"POST /api/models/{NAME}/commit/main", _Handler.commit),
    (rf"GET /api/models/{NAME}(?:/revision/([\w.-]+))?", _Handler.info),
    (rf"GET /api/models/{NAME}/tree/([\w.-]+).*", _Handler.tree),
    (rf"(?:GET|HEAD) /{NAME}/resolve/([\w.-]+)/(.*)", _Handler.resolve),
]
