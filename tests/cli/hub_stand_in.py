"""A stand-in of the Hub's API on this machine: repositories in memory, as far as `visadapt push` and `pull` need it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

TOKEN = "hf_secretofthetests"


class Hub:
    """Repositories by name, each a dict of path → bytes.

    Attributes:
        repos: What is there.
        private: Names of those that only the token may see.
        commits: Messages, in order.
        asked: Method and path of each request.
        breaks: What to do wrong: "commit", "upload" or "download" break off there.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.commits: list[str] = []
        self.asked: list[str] = []
        self.blobs: dict[str, bytes] = {}
        self.breaks = ""
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def sha(self, repo: str) -> str:
        """The commit of a repository: the same for the same files."""
        digest = hashlib.sha1(repo.encode())
        for name, content in sorted(self.repos[repo].items()):
            digest.update(name.encode() + content)
        return digest.hexdigest()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._get(body=True)

    def do_HEAD(self) -> None:
        self._get(body=False)

    def do_POST(self) -> None:
        path, content = self._asked(), self._body()
        if not self._allowed():
            self._json({"error": "Invalid username or password."}, 401)
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(content))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = json.loads(content)["files"]
            mode = ("lfs", "regular")
            self._json({"files": [{"path": f["path"], "uploadMode": mode[not f["path"].endswith(".safetensors")],
                                   "shouldIgnore": False, "oid": None} for f in files]})  # fmt: skip
        elif path.endswith(".git/info/lfs/objects/batch"):
            actions = [
                {"oid": o["oid"], "size": o["size"],
                 "actions": {"upload": {"href": f"{self.hub.address}/upload/{o['oid']}"}}}
                for o in json.loads(content)["objects"]
            ]  # fmt: skip
            self._json({"objects": actions, "transfer": "basic"})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self._commit(match[1], content)
        else:
            self._json({"error": path}, 404)

    def do_PUT(self) -> None:
        path, content = self._asked(), self._body()
        if self.hub.breaks == "upload":
            self._json({"error": "broken"}, 400)
            return
        self.hub.blobs[path.rpartition("/")[2]] = content
        self._json({})

    # --- what it does ---
    def _create(self, wish: dict) -> None:
        name = f"{wish['organization']}/{wish['name']}"
        if name in self.hub.repos:
            self._json({"error": "You already created this model repo", "url": f"{self.hub.address}/{name}"}, 409)
            return
        self.hub.repos[name] = {}
        if wish.get("private") or wish.get("visibility") == "private":
            self.hub.private.add(name)
        self._json({"url": f"{self.hub.address}/{name}", "name": name})

    def _commit(self, repo: str, content: bytes) -> None:
        if self.hub.breaks == "commit":
            self._json({"error": "the server is tired"}, 400)
            return
        files = dict(self.hub.repos[repo])
        for line in map(json.loads, content.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.hub.commits.append(value["summary"])
            else:
                inline = base64.b64decode(value["content"]) if line["key"] == "file" else self.hub.blobs[value["oid"]]
                files[value["path"]] = inline
        self.hub.repos[repo] = files
        sha = self.hub.sha(repo)
        self._json({"commitUrl": f"{self.hub.address}/{repo}/commit/{sha}", "commitOid": sha, "pullRequestUrl": None})

    def _get(self, body: bool) -> None:
        path = self._asked()
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/([^/]+))?", path):
            self._info(match[1], match[2])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(match[1], match[3], body)
        else:
            self._json({"error": path}, 404)

    def _seen(self, repo: str) -> bool:
        return repo in self.hub.repos and (repo not in self.hub.private or self._allowed())

    def _info(self, repo: str, revision: str | None) -> None:
        if not self._seen(repo):
            self._json({"error": "Repository not found"}, 401, {"X-Error-Code": "RepoNotFound"})
        elif revision not in (None, "main", self.hub.sha(repo)):
            self._json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        else:
            held = self.hub.repos[repo]
            siblings = [{"rfilename": name, "size": len(content)} for name, content in held.items()]
            told = {"id": repo, "modelId": repo, "sha": self.hub.sha(repo), "siblings": siblings}
            self._json(told | {"private": repo in self.hub.private})

    def _file(self, repo: str, name: str, body: bool) -> None:
        if not self._seen(repo) or name not in self.hub.repos[repo]:
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        content = self.hub.repos[repo][name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.hub.sha(repo))
        self.end_headers()
        if body and self.hub.breaks == "download":
            self.wfile.write(content[: len(content) // 2 if "Range" not in self.headers else 0])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif body:
            self.wfile.write(content)

    # --- wire ---
    def _asked(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        return path

    def _allowed(self) -> bool:
        return self.headers.get("authorization") == f"Bearer {TOKEN}"

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _json(self, answer: dict, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
