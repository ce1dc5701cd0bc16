"""A fake Hugging Face hub: the part of its protocol that uploads and downloads need."""

import base64
import hashlib
import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Hub(ThreadingHTTPServer):
    """Repositories in memory: git files and LFS objects.

    Attributes:
        files: `user/name/path` -> content.
        large: Paths that were uploaded as LFS objects.
        refused: Unknown requests.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.large: set[str] = set()
        self.refused: list[str] = []
        self.commits = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: object = None, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def unknown(self) -> None:
        self.server.refused.append(f"{self.command} {self.path}")
        self.answer(404, {"error": "not here"}, X_Error_Code="EntryNotFound")

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self) -> None:
        hub = self.server
        body = self.body()
        path = self.path.split("?")[0]
        if not path.startswith("/api/validate-yaml") and self.headers.get("Authorization") != "Bearer secret":
            return self.answer(401, {"error": "who are you?"})
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            given = json.loads(body)
            return self.answer(200, {"url": f"{hub.address}/{given['organization']}/{given['name']}"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if parts[0] == "api" and parts[1] in ("models", "datasets") and parts[4] == "preupload":
            files = [
                {"path": file["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".parquet")) else "regular"}
                for file in json.loads(body)["files"]
            ]  # fmt: skip
            return self.answer(200, {"files": files})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**item, "actions": {"upload": {"href": f"{hub.address}/lfs/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if parts[0] == "api" and parts[1] in ("models", "datasets") and parts[4] == "commit":
            repository = "/".join(parts[2:4])
            for line in body.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "file":
                    hub.files[f"{repository}/{value['path']}"] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    hub.files[f"{repository}/{value['path']}"] = hub.objects[value["oid"]]
                    hub.large.add(value["path"])
            hub.commits += 1
            return self.answer(200, {"commitUrl": f"{hub.address}/{repository}/commit/1", "commitOid": "1" * 40})
        return self.unknown()

    def do_PUT(self) -> None:
        content = self.body()
        oid = self.path.rpartition("/")[2]
        if hashlib.sha256(content).hexdigest() != oid:
            return self.answer(400, {"error": "another content"})
        self.server.objects[oid] = content
        return self.answer(200, {})

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/")
        repository, found, name = path.partition("/resolve/")
        content = self.server.files.get(f"{repository}/{name.partition('/')[2]}")
        if found and content is not None:
            etag = hashlib.sha256(content).hexdigest()
            return self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit="1" * 40)
        if path in ("api/models/user/name", "api/datasets/user/name"):
            siblings = [{"rfilename": file.removeprefix("user/name/")} for file in self.server.files]
            return self.answer(200, {"id": "user/name", "sha": "1" * 40, "siblings": siblings, "tags": []})
        return self.unknown()

    do_HEAD = do_GET


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """Environment of a process that uses this server as the hub."""
    return {
        **os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
