"""A loopback stand-in for the Hub's HTTP API, on the standard library.

It keeps repositories, branches, commits and LFS objects in memory and answers what `huggingface_hub`, `transformers`,
`peft` and `datasets` ask while they create, upload, load, stream and delete. A client process reaches it through
`HF_ENDPOINT` (see `HubStandIn.environment`). It proves that our calls speak the client's protocol, and how we behave
when the answer is no; it does not prove that the Hub itself accepts a push.
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".parquet", ".wav", ".flac")
DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, bytes]
    lfs: dict[str, str]  # path -> sha256, for those that went through LFS


@dataclass
class Repository:
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def commit_at(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.oid == revision), None)


class HubStandIn:
    """Serve on a free port while the context lasts.

    Attributes:
        token: the one token that may write.
        repositories: (type, id) -> Repository, type being model, dataset or space.
        requests: "STATUS METHOD PATH" of every request answered.
        break_off: paths of files whose download is announced and then broken off.
        hold_uploads: set to keep LFS uploads waiting for their answer; `upload_started` tells that one waits.
    """

    user = "tester"
    token = "hf_stand_in"

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.break_off: set[str] = set()
        self.hold_uploads = threading.Event()
        self.upload_started = threading.Event()
        self.lock = threading.Lock()

    def __enter__(self) -> "HubStandIn":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, cache: os.PathLike, token: str | None = token) -> dict[str, str]:
        """Environment of a client process: this endpoint, its own cache, and a token where one is given."""
        removed = {
            "HF_HUB_OFFLINE",
            "TRANSFORMERS_OFFLINE",
            "HF_DATASETS_OFFLINE",
            "HF_TOKEN",
            "HTTP_PROXY",
            "http_proxy",
        }
        kept = {key: value for key, value in os.environ.items() if key not in removed}
        return kept | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            **({"HF_TOKEN": token} if token else {}),
        }

    def files(self, repo_type: str, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds, path -> content."""
        commit = self.repositories[repo_type, repo_id].commit_at(revision)
        assert commit is not None, f"{repo_id} has no revision {revision}"
        return commit.files


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    # -- in and out --------------------------------------------------------------------------------------------------

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, status: int, content: object = None, headers: dict[str, str] | None = None) -> None:
        """JSON, or the bytes as they are; a HEAD request gets the headers alone."""
        data = content if isinstance(content, bytes) else json.dumps(content if content is not None else {}).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self.hub.requests.append(f"{status} {self.command} {self.path}")

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def handle_request(self) -> None:
        body = self.read_body()
        url = urlparse(self.path)
        path = unquote(url.path)
        self.query = parse_qs(url.query)
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given != self.hub.token:
            return self.refuse(401, "InvalidToken", "Invalid credentials in Authorization header")
        self.may_write = given == self.hub.token
        for pattern, needs_token, method in ROUTES:
            if match := re.fullmatch(pattern, path):
                if needs_token and not self.may_write:
                    return self.refuse(401, "Unauthorized", "Invalid username or password.")
                return method(self, body, **match.groupdict())
        return self.refuse(404, "NotImplemented", f"the stand-in does not serve {path}")

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = handle_request

    def repository(self, repo_type: str, repo_id: str) -> Repository | None:
        """None, with the answer already sent, where the repository is missing or private to others."""
        found = self.hub.repositories.get((repo_type, repo_id))
        if found is None or (found.private and not self.may_write):
            # Like the Hub: who is not signed in cannot tell a private repository from a missing one.
            status = 404 if self.may_write else 401
            self.refuse(status, "RepoNotFound", "Repository not found")
            return None
        return found

    def commit(self, repo_type: str, repo_id: str, revision: str) -> Commit | None:
        found = self.repository(repo_type, repo_id)
        if found is None:
            return None
        commit = found.commit_at(unquote(revision))
        if commit is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # -- accounts and repositories -----------------------------------------------------------------------------------

    def whoami(self, body: bytes) -> None:
        token = {"displayName": "stand-in", "role": "write"}
        self.answer(200, {"type": "user", "name": self.hub.user, "orgs": [], "auth": {"accessToken": token}})

    def validate_yaml(self, body: bytes) -> None:
        try:
            block = re.match(r"---\n(.*?)\n---", json.loads(body)["content"], re.DOTALL)
            problems = [] if block and isinstance(yaml.safe_load(block[1]), dict) else ["no metadata block"]
        except yaml.YAMLError as error:
            problems = [str(error)]
        self.answer(400 if problems else 200, {"errors": [{"message": p} for p in problems], "warnings": []})

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        repo_type = wanted.get("type") or "model"
        repo_id = f"{wanted.get('organization') or self.hub.user}/{wanted['name']}"
        url = f"{self.hub.endpoint}/{'' if repo_type == 'model' else repo_type + 's/'}{repo_id}"
        if wanted.get("organization") not in (None, self.hub.user):
            return self.refuse(
                403, "Forbidden", f"You don't have the rights to create a {repo_type} under this namespace"
            )
        with self.hub.lock:
            if (repo_type, repo_id) in self.hub.repositories:
                return self.answer(409, {"error": "You already created this repo", "url": url})
            first = Commit(_new_oid(), "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"}, {})
            private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            self.hub.repositories[repo_type, repo_id] = Repository(private, {"main": [first]})
        return self.answer(200, {"url": url, "name": repo_id, "id": repo_id})

    def delete(self, body: bytes) -> None:
        wanted = json.loads(body)
        key = (wanted.get("type") or "model", f"{wanted.get('organization') or self.hub.user}/{wanted['name']}")
        if self.repository(*key) is not None:
            del self.hub.repositories[key]
            self.answer(200)

    def create_branch(self, body: bytes, repo_type: str, repo_id: str, revision: str) -> None:
        found = self.repository(repo_type, repo_id)
        if found is None:
            return
        with self.hub.lock:
            if revision in found.branches:
                return self.answer(409, {"error": "Reference already exists"})
            found.branches[revision] = list(found.branches["main"])
        self.answer(200)

    # -- uploads -----------------------------------------------------------------------------------------------------

    def preupload(self, body: bytes, repo_type: str, repo_id: str, revision: str) -> None:
        if self.commit(repo_type, repo_id, revision) is None:
            return
        files = []
        for file in json.loads(body)["files"]:
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None})
        self.answer(200, {"files": files})

    def lfs_batch(self, body: bytes, repo_id: str) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.endpoint}/_lfs/{wanted['oid']}", "header": {}}
                entry["actions"] = {
                    "upload": upload,
                    "verify": {"href": f"{self.hub.endpoint}/_lfs/verify", "header": {}},
                }
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        self.hub.upload_started.set()
        if self.hub.hold_uploads.is_set():
            self.close_connection = True
            return
        if hashlib.sha256(body).hexdigest() != oid:
            return self.refuse(422, "Sha256Mismatch", "the object is not what its name says")
        self.hub.objects[oid] = body
        self.answer(200)

    def lfs_verify(self, body: bytes) -> None:
        self.answer(200)

    def make_commit(self, body: bytes, repo_type: str, repo_id: str, revision: str) -> None:
        with self.hub.lock:
            parent = self.commit(repo_type, repo_id, revision)
            if parent is None:
                return
            commit = Commit(_new_oid(), "", dict(parent.files), dict(parent.lfs))
            for line in body.splitlines():
                operation = json.loads(line)
                key, value = operation["key"], operation["value"]
                if key == "header":
                    commit.title = value.get("summary", "")
                elif key == "file":
                    commit.files[value["path"]] = base64.b64decode(value["content"])
                    commit.lfs.pop(value["path"], None)
                elif key == "lfsFile":
                    if value["oid"] not in self.hub.objects:
                        return self.refuse(400, "MissingLfsObject", f"{value['path']} was not uploaded")
                    commit.files[value["path"]] = self.hub.objects[value["oid"]]
                    commit.lfs[value["path"]] = value["oid"]
                elif key == "deletedFile":
                    del commit.files[value["path"]]
                    commit.lfs.pop(value["path"], None)
            self.hub.repositories[repo_type, repo_id].branches[revision].append(commit)
        url = f"{self.hub.endpoint}/{repo_id}/commit/{commit.oid}"
        self.answer(200, {"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

    # -- downloads ---------------------------------------------------------------------------------------------------

    def info(self, body: bytes, repo_type: str, repo_id: str, revision: str | None = None) -> None:
        commit = self.commit(repo_type, repo_id, revision or "main")
        if commit is None:
            return
        block = re.match(rb"---\n(.*?)\n---", commit.files.get("README.md", b""), re.DOTALL)
        siblings = [{"rfilename": p, "size": len(c), "blobId": _git_oid(c)} for p, c in commit.files.items()]
        dates = {"lastModified": DATE, "createdAt": DATE}
        counts = {"gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
        private = self.hub.repositories[repo_type, repo_id].private
        card = yaml.safe_load(block[1]) if block else {}
        names = {"_id": "0", "id": repo_id, "modelId": repo_id, "author": repo_id.split("/")[0], "sha": commit.oid}
        self.answer(200, {**names, "private": private, **counts, **dates, "cardData": card, "siblings": siblings})

    def refs(self, body: bytes, repo_type: str, repo_id: str) -> None:
        found = self.repository(repo_type, repo_id)
        if found is not None:
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commits[-1].oid}
                for name, commits in found.branches.items()
            ]
            self.answer(200, {"branches": branches, "converts": [], "tags": []})

    def tree(self, body: bytes, repo_type: str, repo_id: str, revision: str, folder: str | None = None) -> None:
        commit = self.commit(repo_type, repo_id, revision)
        if commit is None:
            return
        prefix = f"{folder}/" if folder else ""
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries: dict[str, dict] = {}
        for path in sorted(p for p in commit.files if p.startswith(prefix)):
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)):
                if recursive or depth == 1:
                    parent = prefix + "/".join(parts[:depth])
                    entries[parent] = {"type": "directory", "path": parent, "oid": "0" * 40, "size": 0}
            if recursive or len(parts) == 1:
                entries[path] = _file_entry(commit, path)
        if folder and not entries:
            return self.refuse(404, "EntryNotFound", f"{folder} does not exist")
        self.answer(200, list(entries.values()))

    def paths_info(self, body: bytes, repo_type: str, repo_id: str, revision: str) -> None:
        commit = self.commit(repo_type, repo_id, revision)
        if commit is None:
            return
        is_json = "json" in self.headers.get("Content-Type", "")
        wanted = json.loads(body)["paths"] if is_json else parse_qs(body.decode())["paths"]
        entries = []
        for path in [wanted] if isinstance(wanted, str) else wanted:
            path = path.strip("/")
            if path in commit.files:
                entries.append(_file_entry(commit, path))
            elif any(p.startswith(f"{path}/") for p in commit.files):
                entries.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        self.answer(200, entries)

    def resolve(self, body: bytes, prefix: str, repo_id: str, revision: str, path: str) -> None:
        commit = self.commit(prefix.rstrip("s/") or "model", repo_id, revision)
        if commit is None:
            return
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            message = f"{path} does not exist"
            return self.answer(404, {"error": message}, headers | {"X-Error-Code": "EntryNotFound"})
        data = commit.files[path]
        headers["ETag"] = f'"{commit.lfs.get(path, _git_oid(data))}"'
        if path in self.hub.break_off and self.command == "GET":
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.close_connection = True
            return None
        span = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span and self.command == "GET":
            first, last = int(span[1]), min(int(span[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return self.answer(206, data[first : last + 1], headers)
        return self.answer(200, data, headers)


def _new_oid() -> str:
    return hashlib.sha1(os.urandom(16)).hexdigest()


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _file_entry(commit: Commit, path: str) -> dict:
    data = commit.files[path]
    entry = {"type": "file", "path": path, "oid": _git_oid(data), "size": len(data)}
    if path in commit.lfs:
        entry["lfs"] = {"oid": commit.lfs[path], "size": len(data), "pointerSize": 134}
    return entry


_ID = r"(?P<repo_id>[^/]+/[^/]+)"
_API = rf"/api/(?P<repo_type>model|dataset|space)s/{_ID}"
_REVISION = r"(?P<revision>refs/[^/]+/[^/]+|[^/]+)"
# pattern of the path, whether it needs the token, what answers
ROUTES = [
    (r"/api/whoami-v2", True, _Handler.whoami),
    (r"/api/validate-yaml", False, _Handler.validate_yaml),
    (r"/api/repos/create", True, _Handler.create),
    (r"/api/repos/delete", True, _Handler.delete),
    (rf"{_API}/branch/{_REVISION}", True, _Handler.create_branch),
    (rf"{_API}/preupload/{_REVISION}", True, _Handler.preupload),
    (rf"/(?:(?:datasets|spaces)/)?{_ID}\.git/info/lfs/objects/batch", True, _Handler.lfs_batch),
    (r"/_lfs/verify", False, _Handler.lfs_verify),
    (r"/_lfs/(?P<oid>[0-9a-f]{64})", False, _Handler.lfs_put),
    (rf"{_API}/commit/{_REVISION}", True, _Handler.make_commit),
    (_API, False, _Handler.info),
    (rf"{_API}/revision/{_REVISION}", False, _Handler.info),
    (rf"{_API}/refs", False, _Handler.refs),
    (rf"{_API}/tree/{_REVISION}(?:/(?P<folder>.+))?", False, _Handler.tree),
    (rf"{_API}/paths-info/{_REVISION}", False, _Handler.paths_info),
    (rf"/(?P<prefix>(?:datasets/|spaces/)?){_ID}/(?:resolve|raw)/{_REVISION}/(?P<path>.+)", False, _Handler.resolve),
]
