"""A fake Hugging Face Hub on this machine, for uploads and downloads of models, and for reading data sets.

    with HubServer(tokens={"hf_test": "me"}) as hub:
        subprocess.run([sys.executable, "-c", script], env=hub.env(tmp_path), check=True)
        assert "model.safetensors" in hub.files("me/tiny")

A data set is a repository named "datasets/USER/NAME". huggingface_hub reads its settings when it is imported, so its
calls belong in a child process. The server supports what huggingface_hub 2.4 needs without Xet: uploads of LFS files in
one part, and downloads without a redirect to another host.
"""

import base64
import hashlib
import http.server
import json
import math
import os
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".npz")  # some of the suffixes in the Hub's .gitattributes
LFS_SIZE = 10 << 20  # larger files are always LFS files
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


def is_lfs(path, sample, size):
    """Return whether the Hub stores a file as an LFS file. This depends on its name, its size and its first bytes."""
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_SIZE or b"\0" in sample)


def git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def oid(path, content):
    """Return the id that tells whether a file changed: SHA-256 of an LFS file, git blob id of a regular one."""
    return hashlib.sha256(content).hexdigest() if is_lfs(path, content[:512], len(content)) else git_oid(content)


def card_errors(card):
    """Return the problems of a model card's metadata for which the Hub would refuse it."""
    from huggingface_hub import ModelCard

    try:
        data = ModelCard(card).data.to_dict()
    except Exception as error:
        return [str(error)]
    errors = [f"{key} is required" for key in ("library_name", "pipeline_tag", "tags") if key not in data]
    if data.get("license") == "other" and "license_name" not in data:
        errors.append("license: other needs a license_name")
    for key in ("license", "base_model", "pipeline_tag"):
        if not isinstance(data.get(key, ""), str):
            errors.append(f"{key} must be text")
    for model in data.get("model-index", []):
        for result in model["results"]:
            errors += [f"{metric} is not finite" for metric in result["metrics"] if not math.isfinite(metric["value"])]
    return errors


class Refusal(Exception):
    """An error response. The client decides by `code` and shows `message`."""

    def __init__(self, status, message, code=None, **body):
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


@dataclass
class Request:
    """A request. status is None if the connection was dropped without a response."""

    method: str
    path: str
    received: int = 0
    status: int | None = None


@dataclass
class Fault:
    times: float
    status: int
    method: str | None
    path: str
    drop: bool


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    branches: dict = field(default_factory=dict)  # {branch: [sha of each commit, oldest first]}
    commits: dict = field(default_factory=dict)  # {sha: (title, {path: content})}
    objects: dict = field(default_factory=dict)  # {sha256: content}, including uploads that are in no commit yet

    def at(self, revision):
        """Return (sha, {path: content}) of a branch or a sha."""
        sha = self.branches[revision][-1] if revision in self.branches else revision
        if sha not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, self.commits[sha][1]

    def commit(self, branch, title, files):
        history, files = self.branches.setdefault(branch, []), dict(sorted(files.items()))
        known = (history, title, [(path, git_oid(content)) for path, content in files.items()])
        sha = hashlib.sha1(repr(known).encode()).hexdigest()
        self.commits[sha] = (title, files)
        history.append(sha)
        return sha


class HubServer:
    """The server, its repositories and the list of its requests.

    tokens: {token: user}. A user may write to the namespace of that name and read its private repositories.
    requests: every Request so far. delay: seconds before each answer. faults: remaining faults of fail().
    """

    def __init__(self, tokens=None):
        self.tokens = tokens or {}
        self.repos, self.requests, self.faults, self.delay = {}, [], [], 0
        self.lock = threading.RLock()  # each request has a separate thread
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        """Refuse all connections from now on."""
        self.server.shutdown()
        self.server.server_close()

    def env(self, home, token=True, **more):
        """Return the environment for a child process. token: True for the first token, None for no token."""
        theirs = ("HF_", "HUGGING", "TRANSFORMERS_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        env = {key: value for key, value in os.environ.items() if not key.upper().startswith(theirs)}
        env |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        if token is True:
            token = next(iter(self.tokens), None)
        return env | ({"HF_TOKEN": token} if token else {}) | more

    def add(self, repo, files, *, revision="main", title="add", private=False, gated=False):
        """Commit {path: content} to a repository, which is created if missing, and return the sha."""
        with self.lock:
            if repo not in self.repos:
                self.repos[repo] = Repo(private, gated)
                self.repos[repo].commit("main", "initial commit", {".gitattributes": GITATTRIBUTES})
            there = self.repos[repo]
            there.branches.setdefault(revision, list(there.branches["main"]))
            there.objects |= {oid(path, content): content for path, content in files.items()}
            return there.commit(revision, title, {**self.files(repo, revision), **files})

    def files(self, repo, revision="main"):
        """Return {path: content} of a branch or a sha."""
        return dict(self.repos[repo].at(revision)[1])

    def commits(self, repo, revision="main"):
        """Return [(title, sha)] of the commits of a branch, oldest first."""
        return [(self.repos[repo].commits[sha][0], sha) for sha in self.repos[repo].branches[revision]]

    def fail(self, times=1, status=500, *, method=None, path="", drop=False):
        """Answer the next `times` requests of this method whose path contains this text with this status.

        drop: instead of a status, end the connection: in the middle of the answer to a GET, or in the middle of the
        body of any other request. times: may be math.inf; hub.faults.clear() ends the faults.
        """
        self.faults.append(Fault(times, status, method, path, drop))

    def fault(self, request):
        """Return the Fault for this request, or None."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method in (None, request.method) and fault.path in request.path:
                    fault.times -= 1
                    return fault

    def bytes_received(self, method=None):
        """Return the total size of the bodies of all requests of a method."""
        return sum(request.received for request in self.requests if method in (None, request.method))


class Handler(http.server.BaseHTTPRequestHandler):
    """One request. HTTP/1.0 closes each connection after the answer, so no connection remains open after close()."""

    hub = None

    def log_message(self, *args):
        pass

    def handle_any(self):
        self.asked = Request(self.command, self.path)
        with self.hub.lock:
            self.hub.requests.append(self.asked)
            fault = self.hub.fault(self.asked)
        self.drop = bool(fault and fault.drop)
        size = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(size // 2 if self.drop else size)
        self.asked.received = len(self.body)
        time.sleep(self.hub.delay)
        if self.drop and self.command != "GET":
            return self.hang_up()
        try:
            if fault and not self.drop:
                raise Refusal(fault.status, f"Asked to fail with {fault.status}")
            with self.hub.lock:
                answer = self.route()
            self.answer(*answer if isinstance(answer, tuple) else (json.dumps(answer).encode(),))
        except Refusal as refusal:
            self.answer(json.dumps(refusal.body).encode(), refusal.status, refusal.headers)
        except ConnectionError:
            pass  # the client has given up waiting

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def answer(self, content, status=200, headers=None):
        self.asked.status = None if self.drop else status
        self.send_response(status)
        headers = {"Content-Length": len(content), "Content-Type": "application/json", **(headers or {})}
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if self.drop else content)
        if self.drop:
            self.hang_up()

    def hang_up(self):
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    # ---- who asks for what

    def user(self):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def repo(self, name, write=False):
        """Return the repository of this name. Raise a Refusal if the user may not read it, or not write to it."""
        user, repo = self.user(), self.hub.repos.get(name)
        owner = user == name.split("/")[-2]
        if user is None and (write or repo is None or repo.private):
            # the real Hub does not send the code with a 401: the client infers it, but only for https URLs
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        if repo is None or (repo.private and not owner):
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if write and not owner:
            raise Refusal(403, "You don't have write access to this repository")
        return repo

    def route(self):
        """Return the answer: a value to send as JSON, or (content, status, headers)."""
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]  # a slash in the name of a branch is quoted
        match self.command, *parts:
            case "GET", "api", "whoami-v2":
                if not self.user():
                    raise Refusal(401, "Invalid username or password.")
                return {"type": "user", "id": self.user(), "name": self.user(), "orgs": [], "auth": {}}
            case "POST", "api", "validate-yaml":
                if errors := card_errors(json.loads(self.body)["content"]):
                    raise Refusal(400, "Invalid metadata", errors=[{"message": error} for error in errors])
                return {"errors": [], "warnings": []}
            case "POST", "api", "repos", "create":
                return self.create(json.loads(self.body))
            case "GET", "api", "models", owner, name:
                return self.info(f"{owner}/{name}", "main")
            case "GET", "api", "models", owner, name, "revision", revision:
                return self.info(f"{owner}/{name}", revision)
            case "GET", "api", "models", owner, name, "tree", revision, *folder:
                return self.tree(f"{owner}/{name}", revision, "/".join(folder), "recursive=true" in url.query)
            case "GET", "api", "datasets", owner, name:
                return self.info(f"datasets/{owner}/{name}", "main")
            case "GET", "api", "datasets", owner, name, "revision", revision:
                return self.info(f"datasets/{owner}/{name}", revision)
            case "GET", "api", "datasets", owner, name, "tree", revision, *folder:
                asked = (f"datasets/{owner}/{name}", revision, "/".join(folder))
                return self.tree(*asked, not {"recursive=true", "recursive=True"}.isdisjoint(url.query.split("&")))
            case "POST", "api", "datasets", owner, name, "paths-info", revision:
                return self.paths_info(f"datasets/{owner}/{name}", revision, parse_qs(self.body.decode())["paths"])
            case "GET" | "HEAD", "datasets", owner, name, "resolve", revision, *path:
                return self.resolve(f"datasets/{owner}/{name}", revision, "/".join(path))
            case "POST", "api", "models", owner, name, "branch", branch:
                return self.create_branch(f"{owner}/{name}", branch, json.loads(self.body or b"{}"))
            case "POST", "api", "models", owner, name, "preupload", revision:
                return self.preupload(f"{owner}/{name}", revision, json.loads(self.body)["files"])
            case "POST", "api", "models", owner, name, "commit", branch:
                lines = [json.loads(line) for line in self.body.splitlines()]
                return self.commit(f"{owner}/{name}", branch, lines)
            case "POST", owner, name, "info", "lfs", "objects", "batch":
                return self.lfs_batch(f"{owner}/{name.removesuffix('.git')}", json.loads(self.body)["objects"])
            case "PUT", owner, name, "lfs", sha256:
                if hashlib.sha256(self.body).hexdigest() != sha256:
                    raise Refusal(400, "The content is not what its SHA-256 says")
                self.hub.repos[f"{owner}/{name}"].objects[sha256] = self.body  # no check: the URL is the permission
                return {}
            case "POST", owner, name, "lfs", "verify":
                if json.loads(self.body)["oid"] not in self.repo(f"{owner}/{name}", write=True).objects:
                    raise Refusal(404, "No such object")
                return {}
            case "GET" | "HEAD", owner, name, "resolve", revision, *path:
                return self.resolve(f"{owner}/{name}", revision, "/".join(path))
        raise Refusal(404, f"The fake Hub does not support {self.command} {self.path}")

    # ---- reading

    def info(self, name, revision):
        repo = self.repo(name)
        sha, files = repo.at(revision)
        return {
            "id": name,
            "sha": sha,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "tags": [],
            "siblings": [{"rfilename": path} for path in files],
        }

    def tree(self, name, revision, folder, recursive):
        """Return the files in a folder. For a data set, also return the folders in it."""
        sha, files = self.repo(name).at(revision)
        prefix = folder + "/" if folder else ""
        below = {path: content for path, content in files.items() if path.startswith(prefix)}
        if folder and not below:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        found = []
        for path, content in below.items():
            if recursive or "/" not in path[len(prefix) :]:
                found.append({"type": "file", "path": path, "size": len(content), "oid": git_oid(content)})
                if is_lfs(path, content[:512], len(content)):
                    found[-1]["lfs"] = {"oid": oid(path, content), "size": len(content), "pointerSize": 134}
        if name.startswith("datasets/"):
            folders = {parent.as_posix() for path in below for parent in PurePosixPath(path).parents} - {".", folder}
            found += [
                {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}
                for path in sorted(folders)
                if path.startswith(prefix) and (recursive or "/" not in path[len(prefix) :])
            ]
        return found

    def paths_info(self, name, revision, paths):
        """Return the entries of tree() for these files and folders, as far as they exist."""
        return [entry for entry in self.tree(name, revision, "", True) if entry["path"] in paths]

    def resolve(self, name, revision, path):
        repo = self.repo(name)
        sha, files = repo.at(revision)
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if repo.gated and self.user() != name.split("/")[-2]:  # anyone may list the files, but not read them
            raise Refusal(403 if self.user() else 401, f"Access to {name} is restricted.", "GatedRepo")
        if path not in files:
            refusal = Refusal(404, "Entry not found", "EntryNotFound")
            refusal.headers |= headers
            raise refusal
        content = files[path]
        headers["ETag"] = f'"{oid(path, content)}"'
        if is_lfs(path, content[:512], len(content)):
            headers |= {"X-Linked-Size": len(content), "X-Linked-Etag": headers["ETag"]}
        if "Range" not in self.headers:
            return content, 200, headers
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last) + 1 if last else None]
        span = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        return part, 206, {**headers, "Content-Range": span}

    # ---- writing

    def create(self, asked):
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        name = f"{asked.get('organization') or user}/{asked['name']}"
        url = {"name": name, "url": f"{self.hub.url}/{name}"}
        if not name.startswith(user + "/"):
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {name.split('/')[0]}")
        if name in self.hub.repos:
            raise Refusal(409, "You already created this model repo", **url)
        repo = self.hub.repos[name] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        repo.commit("main", "initial commit", {".gitattributes": GITATTRIBUTES})
        return {**url, "id": name}

    def create_branch(self, name, branch, asked):
        repo = self.repo(name, write=True)
        if branch in repo.branches:
            raise Refusal(409, f"Reference already exists: refs/heads/{branch}")
        sha, _ = repo.at(asked.get("startingPoint", "main"))
        history = next(history for history in repo.branches.values() if sha in history)
        repo.branches[branch] = history[: history.index(sha) + 1]
        return {}

    def preupload(self, name, revision, asked):
        """Return how to upload each file, and its current id: the client skips unchanged files."""
        _, files = self.repo(name, write=True).at(revision)
        answer = []
        for file in asked:
            path = file["path"]
            lfs = is_lfs(path, base64.b64decode(file["sample"]), file["size"])
            answer.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if lfs else "regular",
                    "shouldIgnore": False,
                    "oid": oid(path, files[path]) if path in files else None,
                }
            )
        return {"files": answer}

    def lfs_batch(self, name, asked):
        """Return where to upload each object. Existing objects have no actions and are not uploaded."""
        repo, url = self.repo(name, write=True), f"{self.hub.url}/{name}/lfs"
        for item in asked:
            if item["oid"] not in repo.objects:
                item["actions"] = {"upload": {"href": f"{url}/{item['oid']}"}, "verify": {"href": f"{url}/verify"}}
        return {"transfer": "basic", "objects": asked}

    def commit(self, name, branch, lines):
        repo = self.repo(name, write=True)
        sha, files = repo.at(branch)
        if branch not in repo.branches:
            raise Refusal(400, f"{branch} is not a branch")
        header, files = lines[0]["value"], dict(files)
        if header.get("parentCommit", sha) != sha:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            kind, value = line["key"], line["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                if value["oid"] not in repo.objects:
                    raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = repo.objects[value["oid"]]
            elif kind in ("deletedFile", "deletedFolder"):
                folder = value["path"].rstrip("/") + "/"
                files = {path: files[path] for path in files if path != value["path"] and not path.startswith(folder)}
        sha = repo.commit(branch, header["summary"], files)
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"}
