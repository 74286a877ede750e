"""A Hub on this machine: the endpoints that huggingface_hub's clients use to publish and to download a dataset.

    python tests/hub_server.py FOLDER PORT

FOLDER keeps everything: blobs by their hash, one JSON file per commit, tags and branches as refs. LFS files are
uploaded in one piece and served with byte ranges. `POST /-/faults` makes the next requests that match fail, and
`GET /-/log` tells what was asked, so that tests can say "nothing was uploaded twice" and "Retry-After was obeyed".
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

REGULAR = 10_000_000  # Bytes up to which a file of text is kept in git itself.


class Store:
    """Repositories on disk; every method is called with the lock held."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lock = folder, threading.RLock()
        self.log: list[dict[str, Any]] = []
        self.faults: list[dict[str, Any]] = []
        (folder / "blobs").mkdir(parents=True, exist_ok=True)

    def repo(self, name: str) -> Path:
        return self.folder / "repos" / name

    def blob(self, oid: str) -> Path:
        return self.folder / "blobs" / oid

    def create(self, name: str, private: bool) -> bool:
        if self.repo(name).exists():
            return False
        (self.repo(name) / "commits").mkdir(parents=True)
        (self.repo(name) / "settings.json").write_text(json.dumps({"private": private}))
        self.commit(name, {}, "initial commit", None)
        return True

    def refs(self, name: str) -> dict[str, str]:
        path = self.repo(name) / "refs.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def point(self, name: str, ref: str, sha: str) -> None:
        (self.repo(name) / "refs.json").write_text(json.dumps(self.refs(name) | {ref: sha}))

    def commit(self, name: str, files: dict[str, Any], message: str, parent: str | None) -> str:
        body = json.dumps({"files": files, "message": message, "parent": parent, "time": time.time()})
        sha = hashlib.sha1(body.encode()).hexdigest()
        (self.repo(name) / "commits" / f"{sha}.json").write_text(body)
        self.point(name, "main", sha)
        return sha

    def resolve(self, name: str, revision: str) -> str | None:
        sha = self.refs(name).get(revision, revision)
        return sha if (self.repo(name) / "commits" / f"{sha}.json").exists() else None

    def files(self, name: str, sha: str) -> dict[str, Any]:
        return json.loads((self.repo(name) / "commits" / f"{sha}.json").read_text())["files"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, *words: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code: str) -> None:
        self.answer({"error": code}, 404, {"X-Error-Code": code})

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/-/"):
            return self.admin(path)
        entry = {"method": self.command, "path": path, "time": time.time(), "range": self.headers.get("Range")}
        self.entry = entry
        with self.store.lock:
            self.store.log.append(entry)
            for fault in self.store.faults:
                if fault["times"] > 0 and re.search(fault["match"], f"{self.command} {path}"):
                    fault["times"] -= 1
                    entry["status"] = fault["status"]
                    if not fault.get("cut"):
                        self.body()
                        wait = {"Retry-After": str(fault["retry_after"])} if "retry_after" in fault else {}
                        return self.answer({"error": "try later"}, fault["status"], wait)
                    entry["cut"] = True
        if self.command == "POST" and not self.headers.get("Authorization"):
            self.body()
            return self.answer({"error": "Invalid username or password."}, 401)
        for method, pattern, action in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method.split("|"):
                return action(self, *found.groups())
        self.body()
        self.missing("EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def admin(self, path: str) -> None:
        with self.store.lock:
            if path == "/-/faults":
                self.store.faults = json.loads(self.body())
                return self.answer({})
            if path == "/-/clear":
                self.body()
                self.store.log.clear()
                return self.answer({})
            self.answer(self.store.log)

    def known(self, name: str) -> bool:
        if self.store.repo(name).exists():
            return True
        self.body()
        self.missing("RepoNotFound")
        return False

    def commit_of(self, name: str, revision: str) -> str | None:
        if not self.known(name):
            return None
        sha = self.store.resolve(name, revision)
        if sha is None:
            self.body()
            self.missing("RevisionNotFound")
        return sha

    # Endpoints ----------------------------------------------------------------------------------------------------

    def whoami(self) -> None:
        self.answer({"type": "user", "name": "tester", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def validate_yaml(self) -> None:
        self.body()
        self.answer({"errors": [], "warnings": []})

    def create_repo(self) -> None:
        wanted = json.loads(self.body())
        name = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        with self.store.lock:
            made = self.store.create(name, wanted.get("private") is True or wanted.get("visibility") == "private")
        url = f"http://{self.headers['Host']}/datasets/{name}"
        self.answer({"url": url, "name": name, "id": name}, 200 if made else 409)

    def info(self, name: str, revision: str | None = None) -> None:
        if sha := self.commit_of(name, revision or "main"):
            settings = json.loads((self.store.repo(name) / "settings.json").read_text())
            siblings = [{"rfilename": path} for path in sorted(self.store.files(name, sha))]
            self.answer({"id": name, "sha": sha, "siblings": siblings, "tags": [], **settings})

    def refs(self, name: str) -> None:
        if self.known(name):
            refs = self.store.refs(name)
            rows = [{"name": ref, "ref": f"refs/tags/{ref}", "targetCommit": sha} for ref, sha in refs.items()]
            tags = [row for row in rows if row["name"] != "main"]
            main = {"name": "main", "ref": "refs/heads/main", "targetCommit": refs["main"]}
            self.answer({"branches": [main], "converts": [], "tags": tags})

    def tag(self, name: str, revision: str) -> None:
        if sha := self.commit_of(name, revision):
            tag = json.loads(self.body())["tag"]
            with self.store.lock:
                if tag in self.store.refs(name):
                    return self.answer({"error": "Tag reference exists already"}, 409)
                self.store.point(name, tag, sha)
            self.answer({})

    def commits(self, name: str, revision: str) -> None:
        sha, rows = self.commit_of(name, revision), []
        while sha:
            commit = json.loads((self.store.repo(name) / "commits" / f"{sha}.json").read_text())
            rows.append({"id": sha, "title": commit["message"], "message": "", "authors": [], "date": _time(commit)})
            sha = commit["parent"]
        if rows:
            self.answer(rows)

    def tree(self, name: str, revision: str, below: str | None = None) -> None:
        if sha := self.commit_of(name, revision):
            rows = [self.row(path, file) for path, file in sorted(self.store.files(name, sha).items())]
            prefix = f"{below}/" if below else ""
            self.answer([row for row in rows if row["path"].startswith(prefix)])

    def paths_info(self, name: str, revision: str) -> None:
        if sha := self.commit_of(name, revision):
            wanted, files = json.loads(self.body())["paths"], self.store.files(name, sha)
            self.answer([self.row(path, files[path]) for path in wanted if path in files])

    @staticmethod
    def row(path: str, file: dict[str, Any]) -> dict[str, Any]:
        row = {"type": "file", "path": path, "size": file["size"], "oid": file["oid"]}
        if file["lfs"]:
            row["lfs"] = {"oid": file["oid"], "sha256": file["oid"], "size": file["size"], "pointerSize": 134}
            row["oid"] = hashlib.sha1(file["oid"].encode()).hexdigest()
        return row

    def preupload(self, name: str, revision: str) -> None:
        if sha := self.commit_of(name, revision):
            asked, here = json.loads(self.body())["files"], self.store.files(name, sha)
            rows = []
            for file in asked:
                text = file["path"].endswith((".md", ".json", ".txt")) and file["size"] <= REGULAR
                row = {"path": file["path"], "uploadMode": "regular" if text else "lfs", "shouldIgnore": False}
                if file["path"] in here:
                    row["oid"] = here[file["path"]]["oid"]
                rows.append(row)
            self.answer({"files": rows})

    def lfs_batch(self, name: str) -> None:
        if self.known(name):
            objects = []
            for wanted in json.loads(self.body())["objects"]:
                row: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
                if not self.store.blob(wanted["oid"]).exists():
                    row["actions"] = {"upload": {"href": f"http://{self.headers['Host']}/-lfs/{wanted['oid']}"}}
                objects.append(row)
            self.answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        size, digest = int(self.headers["Content-Length"]), hashlib.sha256()
        part = self.store.folder / f"part-{threading.get_ident()}-{time.monotonic_ns()}"
        with open(part, "wb") as out:
            while size > 0:
                block = self.rfile.read(min(size, 1 << 20))
                if not block:  # the client is gone
                    return part.unlink()
                out.write(block)
                digest.update(block)
                size -= len(block)
        if digest.hexdigest() != oid:
            part.unlink()
            return self.answer({"error": "hash differs"}, 400)
        part.rename(self.store.blob(oid))
        self.entry["done"] = True
        self.answer({})

    def commit(self, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.store.lock:
            sha = self.commit_of(name, revision)
            if sha is None:
                return None
            if header.get("parentCommit") not in (None, sha):
                return self.answer({"error": "main has moved"}, 412)
            files = dict(self.store.files(name, sha))
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    data = base64.b64decode(value["content"])
                    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
                    self.store.blob(oid).write_bytes(data)
                    files[value["path"]] = {"oid": oid, "size": len(data), "lfs": False}
                elif line["key"] == "lfsFile":
                    if not self.store.blob(value["oid"]).exists():
                        return self.answer({"error": f"LFS pointer of {value['path']} names no file"}, 400)
                    size = self.store.blob(value["oid"]).stat().st_size
                    files[value["path"]] = {"oid": value["oid"], "size": size, "lfs": True}
                elif line["key"] == "deletedFile":
                    files.pop(value["path"], None)
                elif line["key"] == "deletedFolder":
                    files = {path: file for path, file in files.items() if not path.startswith(value["path"])}
            new = self.store.commit(name, files, header["summary"], sha)
        url = f"http://{self.headers['Host']}/datasets/{name}/commit/{new}"
        return self.answer({"commitUrl": url, "commitOid": new, "hookOutput": "", "success": True})

    def download(self, name: str, revision: str, path: str) -> None:
        if not (sha := self.commit_of(name, revision)):
            return None
        files = self.store.files(name, sha)
        if path not in files:
            return self.answer({}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        file, cut = files[path], self.entry.get("cut")
        start, stop = 0, file["size"]
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, stop = int(asked[1]), int(asked[2]) + 1 if asked[2] else stop
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("X-Repo-Commit", sha)
        self.send_header("ETag", f'"{file["oid"]}"')
        if file["lfs"]:
            self.send_header("X-Linked-Etag", f'"{file["oid"]}"')
            self.send_header("X-Linked-Size", str(file["size"]))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{file['size']}")
        self.end_headers()
        if self.command == "HEAD":
            return None
        with open(self.store.blob(file["oid"]), "rb") as data:
            data.seek(start)
            left = (stop - start) // 2 if cut else stop - start
            while left > 0 and (block := data.read(min(left, 1 << 20))):
                self.wfile.write(block)
                left -= len(block)
        if cut:  # a connection that breaks in the middle of a file
            self.close_connection = True
        return None


def _time(commit: dict[str, Any]) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(commit["time"]))


NAME = "([^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", "/api/repos/create", Handler.create_repo),
    ("GET", f"/api/datasets/{NAME}", Handler.info),
    ("GET", f"/api/datasets/{NAME}/revision/(.+)", Handler.info),
    ("GET", f"/api/datasets/{NAME}/refs", Handler.refs),
    ("POST", f"/api/datasets/{NAME}/tag/(.+)", Handler.tag),
    ("GET", f"/api/datasets/{NAME}/commits/([^/]+)", Handler.commits),
    ("GET", f"/api/datasets/{NAME}/tree/([^/]+)(?:/(.+))?", Handler.tree),
    ("POST", f"/api/datasets/{NAME}/paths-info/([^/]+)", Handler.paths_info),
    ("POST", f"/api/datasets/{NAME}/preupload/([^/]+)", Handler.preupload),
    ("POST", f"/api/datasets/{NAME}/commit/([^/]+)", Handler.commit),
    ("POST", f"/datasets/{NAME}.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/-lfs/([0-9a-f]{64})", Handler.lfs_put),
    ("GET|HEAD", f"/datasets/{NAME}/resolve/([^/]+)/(.+)", Handler.download),
]


def main() -> None:
    Handler.store = Store(Path(sys.argv[1]))
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()


if __name__ == "__main__":
    main()
