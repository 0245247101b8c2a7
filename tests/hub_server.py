"""A server that speaks as much of the Hugging Face hub's HTTP as pushing and resuming a run needs: model
repositories of one branch, small files inside commits, large ones as LFS objects.

    with HubServer() as hub: ... hub.url, hub.repos["ada/ants"]
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

SMALL = 4_096
"""bytes; what is larger is uploaded as an LFS object"""


class HubServer(ThreadingHTTPServer):
    """Serves on a free port of this machine, in threads, until the end of the `with` block."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, dict[str, bytes]] = {}
        """{repository: {path: content}}, as its last commit left it"""
        self.commits: dict[str, int] = {}
        """{repository: how many there were}"""
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}
        """{sha256: content} of LFS objects, also those that no commit has named yet"""
        self.before_object = lambda: None
        """called when the first bytes of an LFS object have come"""
        self.lock = threading.Lock()
        self.asked: list[str] = []

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_POST(self):
        path, body = self._path(), self._body()
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] > SMALL else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [self._place(wanted) for wanted in json.loads(body)["objects"]]
            return self._json({"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            return self._commit(found[1], body)
        return self._missing()

    def do_PUT(self):
        digest = self._path().removeprefix("/objects/")
        size = int(self.headers["Content-Length"])
        first = self.rfile.read(min(size, 1_000))
        self.server.before_object()
        content = first + self.rfile.read(size - len(first))
        if len(content) < size:  # whoever sent it is gone
            self.close_connection = True
            return
        assert hashlib.sha256(content).hexdigest() == digest
        self.server.objects[digest] = content
        self._answer(b"")

    def do_GET(self):
        path = self._path()
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            return self._describe(found[1])
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path):
            return self._tree(found[1])
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self._file(found[1], found[2])
        return self._missing()

    do_HEAD = do_GET

    def _create(self, wish):
        repo = f"{wish['organization']}/{wish['name']}" if wish.get("organization") else wish["name"]
        with self.server.lock:
            if repo in self.server.repos:
                return self._json({"error": "exists", "url": f"{self.server.url}/{repo}"}, 409)
            self.server.repos[repo], self.server.commits[repo] = {}, 0
            if wish["visibility"] == "private":
                self.server.private.add(repo)
        return self._json({"url": f"{self.server.url}/{repo}", "name": repo, "id": repo})

    def _place(self, wanted):
        """Where an object goes; nowhere, when it is here."""
        if wanted["oid"] in self.server.objects:
            return wanted
        upload = {"href": f"{self.server.url}/objects/{wanted['oid']}", "header": {}}
        return {**wanted, "authenticated": True, "actions": {"upload": upload}}

    def _commit(self, repo, body):
        """All of it or nothing."""
        files = dict(self.server.repos[repo])
        for line in body.decode().splitlines():
            kind, value = (entry := json.loads(line))["key"], entry["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
            else:
                assert kind == "header", kind
        with self.server.lock:
            self.server.repos[repo] = files
            self.server.commits[repo] += 1
        address = f"{self.server.url}/{repo}/commit/{self._sha(repo)}"
        return self._json({"success": True, "commitOid": self._sha(repo), "commitUrl": address})

    def _describe(self, repo):
        if repo not in self.server.repos:
            return self._missing("RepoNotFound")
        names = [{"rfilename": name} for name in self.server.repos[repo]]
        private = repo in self.server.private
        return self._json({"id": repo, "sha": self._sha(repo), "private": private, "siblings": names})

    def _tree(self, repo):
        if repo not in self.server.repos:
            return self._missing("RepoNotFound")
        files = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in self.server.repos[repo].items()
        ]
        return self._json(files)

    def _file(self, repo, name):
        if repo not in self.server.repos:
            return self._missing("RepoNotFound")
        content = self.server.repos[repo].get(name)
        if content is None:
            return self._missing("EntryNotFound")
        tag = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": self._sha(repo)}
        return self._answer(content, headers=tag)

    def _sha(self, repo):
        return hashlib.sha1(f"{repo} {self.server.commits[repo]}".encode()).hexdigest()

    def _path(self):
        self.server.asked.append(f"{self.command} {self.path}")
        return unquote(urlsplit(self.path).path)

    def _body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _json(self, value, status=200):
        self._answer(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def _missing(self, code="EntryNotFound"):
        self._answer(b"", 404, {"X-Error-Code": code, "X-Error-Message": "not here"})

    def _answer(self, content, status=200, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass
