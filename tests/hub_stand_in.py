"""A stand-in of the Hub on this machine: serves one repository, and takes uploads in the way that huggingface_hub
makes them without Xet. Nothing is checked but what a test looks at."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class StandInHub(ThreadingHTTPServer):
    """Holds what was asked for and what was uploaded."""

    def __init__(self, served: Path | None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.served = served
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, authorization
        self.created: list[dict] = []
        self.uploaded: dict[str, bytes] = {}
        self.large_files: dict[str, bytes] = {}  # by their hash
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandInHub

    def log_message(self, *args: object) -> None:
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, content: object, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle_any(self) -> None:
        path, body = self.path.split("?")[0], self.body()
        self.server.requests.append((self.command, path, self.headers.get("Authorization")))
        if "/forbidden/" in path:
            self.answer({"error": "You may not"}, 403)
        elif self.command in ("GET", "HEAD") and "/resolve/" in path:
            self.serve_file(path.split("/resolve/", 1)[1].split("/", 1)[1])
        elif self.command == "GET" and "/api/models/" in path:
            self.serve_listing(path)
        elif path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.answer({"url": f"{self.server.url}/{self.repository(self.server.created[-1])}"})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            mode = {True: "lfs", False: "regular"}
            self.answer(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": mode[file["path"].endswith(".safetensors")],
                            "shouldIgnore": False,
                        }
                        for file in files
                    ]
                }
            )
        elif path.endswith("/info/lfs/objects/batch"):
            action = {"upload": {"href": f"{self.server.url}/upload"}}
            objects = [
                {**file, "actions": {"upload": {"href": f"{action['upload']['href']}/{file['oid']}"}}}
                for file in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")
        elif self.command == "PUT" and path.startswith("/upload/"):
            self.server.large_files[hashlib.sha256(body).hexdigest()] = body
            self.answer({})
        elif "/commit/" in path:
            self.take_commit(path.removeprefix("/api/models").split("/commit/")[0], body)
        else:
            self.answer({"error": f"the stand-in does not know {path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    @staticmethod
    def repository(created: dict) -> str:
        return f"{created['organization']}/{created['name']}" if created.get("organization") else created["name"]

    def serve_listing(self, path: str) -> None:
        if self.server.served is None or "nothing-here" in path:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return
        files = sorted(file for file in self.server.served.iterdir() if file.is_file())
        if "/tree/" in path:
            self.answer([{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files])
        else:
            siblings = [{"rfilename": file.name} for file in files]
            self.answer({"id": "someone/albert", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})

    def serve_file(self, name: str) -> None:
        file = self.server.served / name
        if not file.is_file():
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
            return
        content = file.read_bytes()
        self.answer(content, X_Repo_Commit=COMMIT, ETag=f'"{hashlib.sha1(content).hexdigest()}"')

    def take_commit(self, repository: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.server.uploaded[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.uploaded[value["path"]] = self.server.large_files[value["oid"]]
        url = f"{self.server.url}{repository}/commit/{COMMIT}"
        self.answer({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": "", "pullRequestUrl": None})


@contextlib.contextmanager
def stand_in_hub(served: Path | None = None) -> Iterator[StandInHub]:
    """Serve the files of a directory, if one is given, as a repository of any name."""
    with StandInHub(served) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
