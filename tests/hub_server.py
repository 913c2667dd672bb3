"""A Hub on 127.0.0.1 for the tests: the endpoints that huggingface_hub uses to read and write repositories, with LFS.

Repositories live in memory. `stop` ends it as a kill would, cutting every connection; `start` brings it back on the same
port with what it held. `fail` makes the next requests fail, by a status or by a cut in the middle of request or answer.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

CUT = "cut"  # instead of a status: the connection ends after half of the request's body
CUT_ANSWER = "cut answer"  # the connection ends after half of the answer's body
ZERO = "0" * 40


@dataclass
class File:
    """A file as a commit holds it."""

    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """Hash that the client compares with that of its own file: git's, or the one of LFS."""
        if self.is_lfs:
            return self.sha256
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    def info(self, path: str) -> dict:
        info = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid[:40]}
        if self.is_lfs:
            info["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 130}
        return info


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, File]


@dataclass
class Repo:
    """Commits, and the branches and tags that point to them."""

    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit("main", "initial commit", {})

    def commit(self, branch: str, message: str, files: dict[str, File]) -> Commit:
        oid = hashlib.sha1(f"{branch} {message} {len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, message, files)
        self.branches[branch] = oid
        return self.commits[oid]

    def at(self, revision: str) -> Commit | None:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return self.commits.get(oid)


@dataclass
class Fault:
    method: str
    path: re.Pattern
    what: int | str
    times: int
    headers: dict[str, str]


class HubServer:
    """The Hub; `endpoint` is what HF_ENDPOINT must be.

    Args:
        tokens: the user that each token belongs to; who writes must give one, and writes into the user's own repos only.
    """

    def __init__(self, tokens: dict[str, str]):
        self.tokens = tokens
        self.read_only: set[str] = set()  # tokens without the right to write
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, bytes]] = []  # method, path with query, body
        self.lock = threading.RLock()
        self.port = 0
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> "HubServer":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._server:
            self.stop()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, home: Path) -> dict[str, str]:
        """Environment in which a process takes this for the Hub, with its caches in `home`."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}

    def start(self) -> None:
        hub = self

        class BoundHandler(Handler):
            server_state = hub

        ThreadingHTTPServer.allow_reuse_address = True
        self._server = _Server(("127.0.0.1", self.port), BoundHandler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def start_again(self) -> None:
        """Forgets everything but tokens, at the same address."""
        if self._server:
            self.stop()
        for held in (self.repos, self.lfs, self.faults, self.requests):
            held.clear()
        self.start()

    def stop(self) -> None:
        server, self._server = self._server, None
        server.shutdown()
        server.server_close()
        server.cut_connections()

    def fail(self, path: str, what: int | str, times: int = 1, method: str = "", **headers: str) -> None:
        """Makes the next `times` requests whose path matches fail with a status, or CUT."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(Fault(method, re.compile(path), what, times, names))

    def add(self, kind: str, repo_id: str, folder: Path) -> None:
        """Makes a repository out of a folder."""
        files = {
            str(path.relative_to(folder)): File(path.read_bytes(), _is_large(path.name))
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        repo = self.repos.setdefault((kind, repo_id), Repo())
        repo.commit("main", "add", files)

    def model(self, repo_id: str) -> Repo:
        return self.repos[("model", repo_id)]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Files of a model's repository at a revision."""
        return {path: file.content for path, file in self.model(repo_id).at(revision).files.items()}

    def messages(self, repo_id: str) -> list[str]:
        """The commits' messages, oldest first, without that of the initial one."""
        return [commit.message for commit in self.model(repo_id).commits.values()][1:]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *args):
        self.connections: set[socket.socket] = set()
        super().__init__(*args)

    def get_request(self):
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def cut_connections(self) -> None:
        for connection in self.connections:
            with contextlib.suppress(OSError):  # it ended by itself
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address) -> None:
        pass  # connections that are cut are what the tests are for


class RefusedError(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, code: str = "", message: str = "", **more: str):
        self.status, self.code, self.message, self.more = status, code, message, more


class Handler(BaseHTTPRequestHandler):
    server_state: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def handle_any(self) -> None:
        hub, parts = self.server_state, urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        fault = self._next_fault(parts.path)
        if fault and fault.what == CUT:
            self.rfile.read(int(self.headers.get("Content-Length") or 2) // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.body = self._read_body()
        with hub.lock:
            hub.requests.append((self.command, self.path, self.body))
            try:
                self.is_cut = bool(fault and fault.what == CUT_ANSWER)
                if fault and not self.is_cut:
                    raise RefusedError(fault.what, message="a fault of the test")
                for method, pattern, action in ROUTES:
                    match = re.fullmatch(pattern, parts.path)
                    if match and self.command in method.split():
                        action(self, **{name: unquote(value or "") for name, value in match.groupdict().items()})
                        return
                raise RefusedError(404, message=f"no such endpoint: {self.command} {self.path}")
            except RefusedError as refusal:
                headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
                headers |= fault.headers if fault else {}
                self.send(json.dumps({"error": refusal.message, **refusal.more}).encode(), refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815

    def _next_fault(self, path: str) -> Fault | None:
        with self.server_state.lock:
            for fault in self.server_state.faults:
                if fault.times and fault.method in ("", self.command) and fault.path.search(path):
                    fault.times -= 1
                    return fault
        return None

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().strip(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if self.is_cut else content)
        if self.is_cut:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def send_json(self, value: object, status: int = 200) -> None:
        self.send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    # ---- who asks, and what for

    def user(self) -> str:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in self.server_state.tokens:
            raise RefusedError(401, message="Invalid credentials in Authorization header")
        return self.server_state.tokens[token]

    def check_write(self, repo_id: str) -> None:
        user, token = self.user(), self.headers["Authorization"].removeprefix("Bearer ")
        if repo_id.split("/")[0] != user or token in self.server_state.read_only:
            raise RefusedError(403, message="You don't have the rights to write here")

    def repo(self, kind: str, repo_id: str) -> Repo:
        repo = self.server_state.repos.get((kind, repo_id))
        if repo is None or (repo.private and self.user() != repo_id.split("/")[0]):
            raise RefusedError(404, "RepoNotFound", "Repository not found")
        return repo

    def commit_at(self, kind: str, repo_id: str, revision: str) -> Commit:
        commit = self.repo(kind, repo_id).at(revision)
        if commit is None:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # ---- accounts and repositories

    def whoami(self) -> None:
        self.send_json({"type": "user", "name": self.user(), "orgs": [], "auth": {"type": "access_token"}})

    def create_repo(self) -> None:
        wanted = json.loads(self.body)
        repo_id, kind = f"{wanted.get('organization') or self.user()}/{wanted['name']}", wanted.get("type", "model")
        self.check_write(repo_id)
        address = {"url": f"{self.server_state.endpoint}/{repo_id}", "name": repo_id}
        if (kind, repo_id) in self.server_state.repos:
            raise RefusedError(409, message="You already created this model repo", **address)
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.server_state.repos[(kind, repo_id)] = Repo(private=bool(private))
        self.send_json(address)

    def auth_check(self, kind: str, repo_id: str) -> None:
        self.repo(kind, repo_id)
        self.check_write(repo_id)
        self.send_json({})

    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        if "license: nonsense" in content:
            raise RefusedError(400, message='"license" must be one of the Hub\'s')
        has_metadata = content.startswith("---\n")
        self.send_json({"errors": [], "warnings": [] if has_metadata else [{"message": "empty metadata"}]})

    def create_branch(self, kind: str, repo_id: str, name: str) -> None:
        self.check_write(repo_id)
        repo = self.repo(kind, repo_id)
        if name in repo.branches:
            raise RefusedError(409, message="Reference already exists")
        repo.branches[name] = json.loads(self.body or b"{}").get("startingPoint") or repo.branches["main"]
        self.send_json({})

    def create_tag(self, kind: str, repo_id: str, revision: str) -> None:
        self.check_write(repo_id)
        repo, name = self.repo(kind, repo_id), json.loads(self.body)["tag"]
        if name in repo.tags:
            raise RefusedError(409, message="Tag reference exists already")
        repo.tags[name] = self.commit_at(kind, repo_id, revision).oid
        self.send_json({})

    def delete_tag(self, kind: str, repo_id: str, revision: str) -> None:
        self.check_write(repo_id)
        if self.repo(kind, repo_id).tags.pop(revision, None) is None:
            raise RefusedError(404, "RevisionNotFound", "no such tag")
        self.send_json({})

    # ---- writing

    def preupload(self, kind: str, repo_id: str, revision: str) -> None:
        self.check_write(repo_id)
        held = self.commit_at(kind, repo_id, revision).files
        self.send_json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if _is_large(file["path"]) else "regular",
                        "shouldIgnore": False,
                        "oid": held[file["path"]].oid if file["path"] in held else None,
                    }
                    for file in json.loads(self.body)["files"]
                ]
            }
        )

    def lfs_batch(self, repo_id: str) -> None:
        self.check_write(repo_id)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            href = f"{self.server_state.endpoint}/lfs/{wanted['oid']}"
            actions = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            is_held = wanted["oid"] in self.server_state.lfs
            objects.append(wanted if is_held else wanted | {"actions": actions})
        self.send_json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise RefusedError(400, message="the content has another hash")
        self.server_state.lfs[oid] = self.body
        self.send(b"")

    def lfs_verify(self, oid: str) -> None:
        if oid not in self.server_state.lfs:
            raise RefusedError(404, message="not uploaded")
        self.send_json({})

    def make_commit(self, kind: str, repo_id: str, revision: str) -> None:
        self.check_write(repo_id)
        repo = self.repo(kind, repo_id)
        if revision not in repo.branches:
            raise RefusedError(404, "RevisionNotFound", f"no branch {revision}")
        files, message = dict(repo.at(revision).files), ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                message = value["summary"]
            elif operation["key"] == "file":
                files[_checked(value["path"])] = File(base64.b64decode(value["content"]), False)
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.server_state.lfs:
                    raise RefusedError(400, message=f"{value['path']} was not uploaded")
                files[_checked(value["path"])] = File(self.server_state.lfs[value["oid"]], True)
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            elif operation["key"] == "deletedFolder":
                files = {path: file for path, file in files.items() if not path.startswith(value["path"])}
        oid = repo.commit(revision, message, files).oid
        self.send_json({"success": True, "commitOid": oid, "commitUrl": f"{self.server_state.endpoint}/{repo_id}"})

    # ---- reading

    def repo_info(self, kind: str, repo_id: str, revision: str = "main") -> None:
        commit = self.commit_at(kind, repo_id, revision or "main")
        siblings = [{"rfilename": path, "size": len(file.content)} for path, file in commit.files.items()]
        self.send_json(
            {"_id": ZERO[:24], "id": repo_id, "sha": commit.oid, "private": False, "siblings": siblings, "tags": []}
        )

    def refs(self, kind: str, repo_id: str) -> None:
        repo = self.repo(kind, repo_id)
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in repo.branches.items()]
        tags = [{"name": name, "ref": f"refs/tags/{name}", "targetCommit": oid} for name, oid in repo.tags.items()]
        self.send_json({"branches": branches, "tags": tags, "converts": []})

    def tree(self, kind: str, repo_id: str, revision: str, path: str = "") -> None:
        files = self.commit_at(kind, repo_id, revision).files
        prefix = f"{path.strip('/')}/" if path.strip("/") else ""
        inside = {name: file for name, file in files.items() if name.startswith(prefix)}
        if prefix and not inside:
            raise RefusedError(404, "EntryNotFound", f"{path} does not exist")
        is_recursive = self.query.get("recursive", "").lower() in ("1", "true")
        entries = {}
        for name, file in inside.items():
            parts = name.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if is_recursive else min(2, len(parts))):
                folder = prefix + "/".join(parts[:depth])
                entries[folder] = {"type": "directory", "path": folder, "oid": ZERO, "size": 0}
            if is_recursive or len(parts) == 1:
                entries[name] = file.info(name)
        self.send_json(list(entries.values()))

    def paths_info(self, kind: str, repo_id: str, revision: str) -> None:
        files, infos = self.commit_at(kind, repo_id, revision).files, []
        is_json = "json" in (self.headers.get("Content-Type") or "")
        paths = json.loads(self.body)["paths"] if is_json else parse_qs(self.body.decode())["paths"]
        for path in [paths] if isinstance(paths, str) else paths:
            if path in files:
                infos.append(files[path].info(path))
            elif any(name.startswith(f"{path}/") for name in files):
                infos.append({"type": "directory", "path": path, "oid": ZERO, "size": 0})
        self.send_json(infos)

    def resolve(self, repo_id: str, revision: str, path: str, kind: str = "model") -> None:
        commit = self.commit_at(kind, repo_id, revision)
        if path not in commit.files:
            raise RefusedError(404, "EntryNotFound", f"{path} does not exist")
        file = commit.files[path]
        content, status = file.content, 200
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if file.is_lfs:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(content))}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        self.send(content, status, headers)


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".png", ".parquet", ".tar", ".bin"))


def _checked(path: str) -> str:
    if path.startswith("/") or ".." in path.split("/"):
        raise RefusedError(400, message=f"invalid path {path}")
    return path


def _of_kind(action):
    """An action that takes the singular of `models` or `datasets`, by which the client names the kind of a repository."""
    return lambda handler, kinds, **values: action(handler, kind=kinds.removesuffix("s"), **values)


_REPO = r"/api/(?P<kinds>models|datasets)/(?P<repo_id>[^/]+/[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create_repo),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("GET", f"{_REPO}/auth-check/write", _of_kind(Handler.auth_check)),
    ("POST", f"{_REPO}/branch/(?P<name>[^/]+)", _of_kind(Handler.create_branch)),
    ("POST", f"{_REPO}/tag/(?P<revision>[^/]+)", _of_kind(Handler.create_tag)),
    ("DELETE", f"{_REPO}/tag/(?P<revision>[^/]+)", _of_kind(Handler.delete_tag)),
    ("POST", f"{_REPO}/preupload/(?P<revision>[^/]+)", _of_kind(Handler.preupload)),
    ("POST", f"{_REPO}/commit/(?P<revision>[^/]+)", _of_kind(Handler.make_commit)),
    ("POST", r"/(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    ("POST", "/lfs/(?P<oid>[0-9a-f]{64})/verify", Handler.lfs_verify),
    ("GET", _REPO, _of_kind(Handler.repo_info)),
    ("GET", f"{_REPO}/revision/(?P<revision>[^/]+)", _of_kind(Handler.repo_info)),
    ("GET", f"{_REPO}/refs", _of_kind(Handler.refs)),
    ("GET", f"{_REPO}/tree/(?P<revision>[^/]+)(?P<path>/.*)?", _of_kind(Handler.tree)),
    ("POST", f"{_REPO}/paths-info/(?P<revision>[^/]+)", _of_kind(Handler.paths_info)),
    (
        "GET HEAD",
        r"/datasets/(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
        lambda handler, **values: handler.resolve(kind="dataset", **values),
    ),
    ("GET HEAD", r"/(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]
