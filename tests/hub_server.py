"""
A Hugging Face Hub on this machine for tests: the real `huggingface_hub` client talks to it, and it fails on request.

    with HubServer({"hf_write": {"role": "write", "name": "me"}}) as server:
        server.fail("PUT /lfs/", 503, "cut")  # the first upload is refused, the second one is cut in the middle
        HfApi(endpoint=server.url, token="hf_write").upload_folder(repo_id="me/model", folder_path=folder)
        assert server.files("me/model")["config.json"] == b"{}"

The client must not take its Xet route, which this Hub does not have: `HF_HUB_DISABLE_XET=1` in a subprocess, or
`huggingface_hub.constants.HF_HUB_DISABLE_XET = True` in this one. PyYAML, which reads the cards, is the only import
from outside the standard library.
"""

import base64
import hashlib
import json
import math
import re
import select
import socket
import struct
import threading
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote

import yaml

LFS_SUFFIXES = (".safetensors", ".jpg", ".png")
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()

# Split words rather than lists, here and below: as literals, they would take a line each.
LICENSES = """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0
    cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
    cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl
    gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr
    mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
    deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    grok2-community gemma unknown other""".split()  # noqa: SIM905
PIPELINE_TAGS = """any-to-any audio-classification audio-text-to-text audio-to-audio automatic-speech-recognition
    depth-estimation document-question-answering feature-extraction fill-mask graph-ml image-classification
    image-feature-extraction image-segmentation image-text-to-image image-text-to-text image-text-to-video image-to-3d
    image-to-image image-to-text image-to-video keypoint-detection mask-generation multiple-choice object-detection
    other question-answering reinforcement-learning robotics sentence-similarity summarization
    table-question-answering table-to-text tabular-classification tabular-regression tabular-to-text
    text-classification text-generation text-ranking text-retrieval text-to-3d text-to-audio text-to-image
    text-to-speech text-to-video time-series-forecasting token-classification translation
    unconditional-image-generation video-classification video-text-to-text video-to-video visual-document-retrieval
    visual-question-answering voice-activity-detection zero-shot-classification zero-shot-image-classification
    zero-shot-object-detection""".split()  # noqa: SIM905
LANGUAGES = """aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz
    ee el en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it
    iu ja jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na
    nb nd ne ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq
    sr ss st su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu
    code multilingual""".split()  # noqa: SIM905
_HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*", re.ASCII)  # `owner/name` or `name`; no path begins with / or .


def front_matter(card: str) -> object:
    """The metadata that a card opens with; None where there are none. Raises `yaml.YAMLError`."""
    found = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", card, re.DOTALL)
    return yaml.safe_load(found[1]) if found else None


def check_card(card: str) -> tuple[list[str], list[str]]:
    """Errors and warnings of the Hub's metadata rules, in its words as far as they are known."""
    try:
        data = front_matter(card)
    except yaml.YAMLError as error:
        return [f"YAML metadata cannot be parsed: {error}"], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return ['"metadata" must be of type object'], []
    errors, warnings = [], []

    def check(key: str, holds: Callable[[Any], bool], rule: str, *, one: bool = True) -> None:
        """Applies a rule to a value, or to every item of a list of them; `one`: a lone value need not be a list."""
        value = data.get(key)
        if key not in data or (value is None and key != "tags"):
            return
        items = [value] if one and not isinstance(value, list) else value
        if not isinstance(items, list):
            errors.append(f'"{key}" must be an array')
            return
        errors.extend(
            f'"{key}" with value "{item}" {rule}' for item in items if not (isinstance(item, str) and holds(item))
        )

    three_letters = re.compile("[a-z]{3}")  # of ISO 639-2 and 639-3, whose 8000 codes are not worth a list
    check("license", LICENSES.__contains__, f"must be one of [{', '.join(LICENSES)}]")
    check(
        "language",
        lambda code: code in LANGUAGES or three_letters.fullmatch(code) is not None,
        'is not valid. It must be an ISO 639-1, 639-2 or 639-3 code, or a special value like "code", "multilingual".',
    )
    check("tags", bool, "must be a string", one=False)
    check("base_model", _is_hub_id, "is not valid. Use a model id from https://hf.co/models.")
    check("datasets", _is_hub_id, "is not valid. Use a dataset id from https://hf.co/datasets.")
    relations = ("adapter", "merge", "quantized", "finetune")
    check("base_model_relation", relations.__contains__, f"must be one of [{', '.join(relations)}]")
    for key in ("pipeline_tag", "library_name", "license_name", "license_link"):
        check(key, bool, "must be a string")
    tag = data.get("pipeline_tag")
    if isinstance(tag, str) and tag not in PIPELINE_TAGS:  # the Hub only warns
        warnings.append(f'The pipeline tag "{tag}" is not in the official list: {", ".join(PIPELINE_TAGS)}')
    if "model-index" in data:
        errors += _check_model_index(data["model-index"])
    return errors, warnings


def _is_hub_id(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 96 and _HUB_ID.fullmatch(value) is not None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_model_index(index: object) -> list[str]:
    errors = []

    def items(value: object, where: str) -> list[tuple[dict[str, Any], str]]:
        if not isinstance(value, list) or not value:
            errors.append(f'"{where}" must be an array with at least one item')
            return []
        named = [(item, f"{where}[{number}]") for number, item in enumerate(value)]
        errors.extend(f'"{name}" must be of type object' for item, name in named if not isinstance(item, dict))
        return [(item, name) for item, name in named if isinstance(item, dict)]

    def need(parent: dict[str, Any], path: str, where: str, holds: Callable[[object], bool], rule: str) -> None:
        value: object = parent
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is None:
            errors.append(f'"{where}.{path}" is required')
        elif not holds(value):
            errors.append(f'"{where}.{path}" {rule}')

    def is_text(value: object) -> bool:
        return isinstance(value, str) and bool(value)

    for model, at_model in items(index, "model-index"):
        need(model, "name", at_model, is_text, "must be a string")
        for result, at in items(model.get("results"), f"{at_model}.results"):
            for path in ("task.type", "dataset.name"):
                need(result, path, at, is_text, "must be a string")
            need(result, "dataset.type", at, _is_hub_id, "is not valid. Use a dataset id from https://hf.co/datasets.")
            for metric, at_metric in items(result.get("metrics"), f"{at}.metrics"):
                need(metric, "type", at_metric, is_text, "must be a string")
                need(metric, "value", at_metric, _is_number, "must be a number")
    return errors


@dataclass(frozen=True)
class File:
    """A file of a commit; one in LFS is a pointer to its bytes as far as git is concerned."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        size = len(self.content)
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()

    @property
    def blob(self) -> str:
        stored = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob


class Commit(NamedTuple):
    """A commit, with every file of the repo as it is then."""

    id: str
    title: str
    message: str
    author: str
    date: str
    files: dict[str, File]


@dataclass
class Repo:
    """A repo: one branch, main, and the LFS objects that were uploaded to it, whether a commit names them or not."""

    kind: str  # models or datasets, as in paths
    id: str
    private: bool
    commits: list[Commit] = field(default_factory=list)  # oldest first
    objects: dict[str, bytes] = field(default_factory=dict)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)

    @property
    def head(self) -> Commit:
        return self.commits[-1]

    @property
    def page(self) -> str:
        return self.id if self.kind == "models" else f"{self.kind}/{self.id}"

    def commit(self, title: str, message: str, author: str, files: dict[str, File]) -> None:
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        id = hashlib.sha1(f"{self.page} {len(self.commits)} {title} {date}".encode()).hexdigest()
        self.commits.append(Commit(id, title, message, author, date, files))

    def entry(self, path: str, commit: Commit, expand: bool) -> dict[str, Any]:
        """The file as `/tree` and `/paths-info` tell of it; `expand`: with the commit that last changed it."""
        file = commit.files[path]
        entry: dict[str, Any] = {"type": "file", "oid": file.blob, "size": len(file.content), "path": path}
        if file.lfs:
            entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}
        if expand:
            last, before = commit, None
            for each in self.commits[: self.commits.index(commit) + 1]:
                if each.files.get(path) != before:
                    last, before = each, each.files.get(path)
            entry["lastCommit"] = {"id": last.id, "title": last.title, "date": last.date}
        return entry


@dataclass(frozen=True)
class Fault:
    """An answer in the place of the true one."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | str | None = None  # None: JSON with an error


FaultKind = int | str | Fault | Callable[[str], Any]
FAULTS = ("drop", "cut", "stall", "land_then_drop")


class Request(NamedTuple):
    """A request that came in; `path` is as sent, quoted and with its query."""

    method: str
    path: str
    received: int  # bytes of the body


class _Refused(Exception):
    """Ends the answering of a request; `code` is what the client tells errors of one status apart by."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        self.status = status
        self.body = {"error": message}
        line = message.replace("\n", " ").encode("ascii", "replace").decode()  # what a header can hold
        self.headers = {"X-Error-Message": line} | ({"X-Error-Code": code} if code else {})
        self.headers |= {name.replace("_", "-"): value for name, value in headers.items()}


class _Answer(NamedTuple):
    body: object  # bytes, or what becomes JSON
    status: int = 200
    headers: dict[str, str] = {}


class _Call(NamedTuple):
    """What an endpoint sees of a request."""

    user: dict[str, Any] | None
    query: dict[str, str]
    headers: Any
    body: bytes


_ID = r"(?P<id>[^/]+/[^/]+)"
_API = rf"/api/(?P<kind>models|datasets)/{_ID}"
_PAGE = rf"/((?P<kind>datasets)/)?{_ID}"
_ROUTES = [
    (re.compile(f"{methods} {path}"), endpoint)
    for methods, path, endpoint in (
        ("GET", "/api/whoami-v2", "whoami"),
        ("POST", "/api/repos/create", "create"),
        ("POST", "/api/validate-yaml", "validate"),
        ("POST", rf"{_API}/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", rf"{_API}/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", rf"{_API}/paths-info/(?P<revision>[^/]+)", "paths_info"),
        ("GET", rf"{_API}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", "tree"),
        ("GET", rf"{_API}/commits/(?P<revision>[^/]+)", "history"),
        ("GET", rf"{_API}/refs", "refs"),
        ("GET", rf"{_API}(/revision/(?P<revision>[^/]+))?", "info"),
        ("POST", rf"{_PAGE}\.git/info/lfs/objects/batch", "batch"),
        ("POST", rf"{_PAGE}\.git/info/lfs/objects/verify", "verify"),
        ("PUT", rf"/lfs/(?P<kind>\w+)/{_ID}/(?P<oid>[0-9a-f]{{64}})(/(?P<part>\d+))?", "put"),
        ("POST", rf"/lfs/(?P<kind>\w+)/{_ID}/(?P<oid>[0-9a-f]{{64}})/complete", "complete"),
        ("(GET|HEAD)", rf"{_PAGE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )
]


class _Endpoints:
    """The Hub itself, without HTTP. A method for each endpoint that takes a call and the named parts of its path."""

    url: str

    def __init__(self, tokens: dict[str, dict[str, Any]], lfs_threshold: int, part_size: int | None) -> None:
        self.tokens, self.lfs_threshold, self.part_size = tokens, lfs_threshold, part_size
        self.repos: dict[tuple[str, str], Repo] = {}
        self.uploads: list[str] = []
        self._lock = threading.Lock()

    def answer(self, method: str, target: str, headers: Any, body: bytes) -> _Answer:
        path, _, query = target.partition("?")
        found = next(((m, name) for route, name in _ROUTES if (m := route.fullmatch(f"{method} {path}"))), None)
        if found is None:  # not 404, which a client may have good reasons to take for an answer
            return _Answer({"error": f"tests/hub_server.py has no {method} {path}"}, 501)
        parts = {name: unquote(part) for name, part in found[0].groupdict().items() if part is not None}
        try:
            scheme, _, token = headers.get("Authorization", "").partition(" ")
            if scheme and token not in self.tokens:
                raise _Refused(401, "Invalid credentials in Authorization header")
            user = {"name": "tester", "role": "read", "orgs": {}, "writes": []} | self.tokens[token] if scheme else None
            call = _Call(user, {key: values[-1] for key, values in parse_qs(query).items()}, headers, body)
            with self._lock:
                return getattr(self, f"_{found[1]}")(call, **parts)
        except _Refused as refused:
            return _Answer(refused.body, refused.status, refused.headers)
        except Exception:  # a fault of the test or of this file: no status that the client would wait and retry on
            return _Answer({"error": traceback.format_exc()}, 501)

    def _may(self, user: dict[str, Any] | None, repo_id: str, *, write: bool) -> bool:
        if user is None:
            return False
        owner = repo_id.split("/")[0]
        role = "admin" if owner == user["name"] else user["orgs"].get(owner)
        if not write or role in (None, "read"):
            return not write and role is not None
        return user["role"] == "write" or (user["role"] == "fineGrained" and bool({owner, repo_id} & {*user["writes"]}))

    def _repo(self, call: _Call, kind: str, id: str, *, write: bool = False) -> Repo:
        repo = self.repos.get((kind, id))
        if repo is None or (repo.private and not self._may(call.user, id, write=False)):
            raise _Refused(404, "Repository not found", "RepoNotFound")
        if write and not self._may(call.user, id, write=True):
            if call.user is None:
                raise _Refused(401, "Invalid username or password.")
            raise _Refused(403, "You must use a write token, of a member who may write, to upload to this repository.")
        return repo

    def _at(self, repo: Repo, revision: str) -> Commit:
        found = [each for each in repo.commits if each.id == revision]
        if not found and revision != "main":
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found[0] if found else repo.head

    def _whoami(self, call: _Call) -> _Answer:
        if (user := call.user) is None:
            raise _Refused(401, "Invalid username or password.")
        token: dict[str, Any] = {"displayName": "test", "role": user["role"]}
        if user["role"] == "fineGrained":
            kinds = {name: "model" if "/" in name else "org" for name in user["writes"]} | {user["name"]: "user"}
            entities = [{"type": kinds[name], "name": name} for name in user["writes"]]
            permissions = ["repo.content.read", "repo.write"]
            scoped = [{"entity": entity, "permissions": permissions} for entity in entities]
            token["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": scoped}
        orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in user["orgs"].items()]
        auth = {"type": "access_token", "accessToken": token}
        return _Answer({"type": "user", "name": user["name"], "fullname": user["name"], "orgs": orgs, "auth": auth})

    def _create(self, call: _Call) -> _Answer:
        wish = json.loads(call.body)
        if call.user is None:
            raise _Refused(401, "Invalid username or password.")
        kind = wish.get("type", "model") + "s"
        id = f"{wish.get('organization') or call.user['name']}/{wish['name']}"
        if not self._may(call.user, id, write=True):
            owner = id.split("/")[0]
            raise _Refused(403, f'You don\'t have the rights to create a {kind[:-1]} under the namespace "{owner}"')
        private = wish.get("visibility") == "private" or bool(wish.get("private"))
        repo = Repo(kind, id, private)
        answer = {"url": f"{self.url}/{repo.page}", "name": id}
        if (kind, id) in self.repos:  # the client reads the url of this answer, too
            return _Answer(answer | {"error": f"You already created this {kind[:-1]} repo"}, 409)
        repo.commit("initial commit", "", call.user["name"], {".gitattributes": File(GIT_ATTRIBUTES, lfs=False)})
        self.repos[kind, id] = repo
        return _Answer(answer)

    def _validate(self, call: _Call) -> _Answer:
        errors, warnings = check_card(json.loads(call.body)["content"])
        found = {"errors": errors, "warnings": warnings}
        return _Answer({key: [{"message": it} for it in texts] for key, texts in found.items()}, 400 if errors else 200)

    def _preupload(self, call: _Call, kind: str, id: str, revision: str) -> _Answer:
        commit = self._at(self._repo(call, kind, id, write=True), revision)
        files = []
        for file in json.loads(call.body)["files"]:
            lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > self.lfs_threshold
            answer = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if there := commit.files.get(file["path"]):
                answer["oid"] = there.etag
            files.append(answer)
        return _Answer({"files": files, "commitOid": commit.id})

    def _batch(self, call: _Call, id: str, kind: str = "models") -> _Answer:
        repo, wish = self._repo(call, kind, id, write=True), json.loads(call.body)
        objects = []
        for each in wish["objects"]:
            answer: dict[str, Any] = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in repo.objects:
                upload: dict[str, Any] = {"href": f"{self.url}/lfs/{kind}/{id}/{each['oid']}"}
                if self.part_size and each["size"] > self.part_size and "multipart" in wish["transfers"]:
                    numbers = range(1, math.ceil(each["size"] / self.part_size) + 1)
                    upload["header"] = {str(number): f"{upload['href']}/{number}" for number in numbers}
                    upload["header"]["chunk_size"] = str(self.part_size)
                    upload["href"] += "/complete"
                verify = {"href": f"{self.url}/{repo.page}.git/info/lfs/objects/verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        return _Answer({"transfer": "basic", "objects": objects})

    def _put(self, call: _Call, kind: str, id: str, oid: str, part: str = "") -> _Answer:
        if part:  # the address is the secret: as with S3, no token comes with it
            self.repos[kind, id].parts[oid, int(part)] = call.body
        else:
            self._store(self.repos[kind, id], oid, call.body)
        return _Answer(b"", 200, {"ETag": f'"{hashlib.md5(call.body).hexdigest()}"'})

    def _complete(self, call: _Call, kind: str, id: str, oid: str) -> _Answer:
        repo, told = self.repos[kind, id], json.loads(call.body)["parts"]
        parts = [repo.parts.get((oid, part["partNumber"]), b"") for part in told]
        if [f'"{hashlib.md5(part).hexdigest()}"' for part in parts] != [part["etag"] for part in told]:
            raise _Refused(400, "The parts are not those that were uploaded.")
        self._store(repo, oid, b"".join(parts))
        return _Answer({"success": True})

    def _store(self, repo: Repo, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise _Refused(400, "The content does not match its oid.")
        repo.objects[oid] = content
        self.uploads.append(oid)

    def _verify(self, call: _Call, id: str, kind: str = "models") -> _Answer:
        repo, told = self._repo(call, kind, id, write=True), json.loads(call.body)
        if told["oid"] not in repo.objects or len(repo.objects[told["oid"]]) != told["size"]:
            raise _Refused(404, "The object was not uploaded.")
        return _Answer({"success": True})

    def _commit(self, call: _Call, kind: str, id: str, revision: str) -> _Answer:
        repo = self._repo(call, kind, id, write=True)
        if "create_pr" in call.query:
            raise _Refused(403, "Pull requests are disabled for this repository.")
        if revision != "main":
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        header, *operations = [json.loads(line) for line in call.body.splitlines()]
        if not repo.head.id.startswith(header["value"].get("parentCommit", "")):
            raise _Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.head.files)
        for operation in operations:
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in repo.objects:
                    raise _Refused(400, f"LFS pointer of {value['path']} points to a file that does not exist.")
                files[value["path"]] = File(repo.objects[value["oid"]], lfs=True)
            elif key in ("deletedFile", "deletedFolder"):
                folder = value["path"].rstrip("/") + "/"
                gone = [p for p in files if (p.startswith(folder) if key == "deletedFolder" else p == value["path"])]
                if not gone:
                    raise _Refused(404, "A file with this name doesn't exist", "EntryNotFound")
                files = {path: file for path, file in files.items() if path not in gone}
            else:
                raise _Refused(400, f"Unknown operation {key}")
        if "README.md" in files and (errors := check_card(files["README.md"].content.decode())[0]):
            raise _Refused(400, "; ".join(errors))
        assert call.user is not None  # or it could not write
        repo.commit(header["value"]["summary"], header["value"]["description"], call.user["name"], files)
        url = f"{self.url}/{repo.page}/commit/{repo.head.id}"
        return _Answer({"success": True, "commitOid": repo.head.id, "commitUrl": url, "hookOutput": ""})

    def _info(self, call: _Call, kind: str, id: str, revision: str = "main") -> _Answer:
        repo = self._repo(call, kind, id)
        commit = self._at(repo, revision)
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.files)]
        if call.query.get("blobs") == "true":
            for sibling in siblings:
                file = commit.files[sibling["rfilename"]]
                sibling |= {"size": len(file.content), "blobId": file.blob}
                if file.lfs:
                    sibling["lfs"] = {"sha256": file.sha256, "size": sibling["size"], "pointerSize": len(file.pointer)}
        card = front_matter(commit.files["README.md"].content.decode()) if "README.md" in commit.files else None
        answer = {"id": id, "author": id.split("/")[0], "sha": commit.id, "private": repo.private, "gated": False}
        answer |= {"createdAt": repo.commits[0].date, "lastModified": commit.date, "siblings": siblings}
        card = card if isinstance(card, dict) else {}
        return _Answer(answer | {"cardData": card, "tags": card.get("tags") or [], "disabled": False})

    def _tree(self, call: _Call, kind: str, id: str, revision: str, path: str = "") -> _Answer:
        repo = self._repo(call, kind, id)
        commit, folder = self._at(repo, revision), path + "/" if path else ""
        recursive, expand = (call.query.get(key) == "true" for key in ("recursive", "expand"))
        entries: dict[str, dict[str, Any]] = {}
        for name in sorted(commit.files):
            if not name.startswith(folder):
                continue
            steps = name.removeprefix(folder).split("/")
            for depth in range(1, len(steps) if recursive else min(2, len(steps))):
                inner = folder + "/".join(steps[:depth])
                entries[inner] = _folder_entry(inner)
            if recursive or len(steps) == 1:
                entries[name] = repo.entry(name, commit, expand)
        if path and not entries:
            raise _Refused(404, f"{path} does not exist on {revision}", "EntryNotFound")
        return _Answer(list(entries.values()))

    def _paths_info(self, call: _Call, kind: str, id: str, revision: str) -> _Answer:
        repo, form = self._repo(call, kind, id), parse_qs(call.body.decode())
        commit, expand = self._at(repo, revision), form.get("expand") == ["true"]
        entries = []
        for path in form.get("paths", []):
            if path in commit.files:
                entries.append(repo.entry(path, commit, expand))
            elif any(name.startswith(path.rstrip("/") + "/") for name in commit.files):
                entries.append(_folder_entry(path.rstrip("/")))
        return _Answer(entries)

    def _history(self, call: _Call, kind: str, id: str, revision: str) -> _Answer:
        repo = self._repo(call, kind, id)
        commits = repo.commits[repo.commits.index(self._at(repo, revision)) :: -1]
        return _Answer([it._asdict() | {"authors": [{"user": it.author}], "files": None} for it in commits])

    def _refs(self, call: _Call, kind: str, id: str) -> _Answer:
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": self._repo(call, kind, id).head.id}
        return _Answer({"branches": [main], "converts": [], "tags": [], "pullRequests": []})

    def _resolve(self, call: _Call, id: str, revision: str, path: str, kind: str = "models") -> _Answer:
        commit = self._at(self._repo(call, kind, id), revision)
        file = commit.files.get(path)
        if file is None:  # with the commit, so that the client remembers the absence
            raise _Refused(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.id)
        headers = {"ETag": f'"{file.etag}"', "X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
        size = len(file.content)
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(size)}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range", ""))
        if span is None:
            return _Answer(file.content, 200, headers)
        start, end = int(span[1]), min(int(span[2] or size), size - 1)
        if start > end:
            raise _Refused(416, "Range not satisfiable", Content_Range=f"bytes */{size}")
        return _Answer(file.content[start : end + 1], 206, headers | {"Content-Range": f"bytes {start}-{end}/{size}"})


def _folder_entry(path: str) -> dict[str, Any]:
    return {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}


class _Handler(BaseHTTPRequestHandler):
    """One connection: reads requests, and answers each with the Hub's answer or with a fault."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes: without this, the second waits 40 ms
    hub: "HubServer"

    def handle(self) -> None:
        with suppress(ConnectionError):  # the client has hung up
            super().handle()

    def log_message(self, *args: object) -> None:
        pass

    def take(self) -> None:
        """Answers one request."""
        if "Transfer-Encoding" in self.headers:
            raise ConnectionAbortedError("huggingface_hub says how long its bodies are")
        length = int(self.headers.get("Content-Length", 0))
        fault = self.hub._next_fault(f"{self.command} {self.path}")
        body = b""
        try:
            body = self.rfile.read(length // 2 if fault == "cut" or callable(fault) else length)
            if callable(fault):
                fault = fault(self.path)
            if fault != "cut":
                body += self.rfile.read(length - len(body))
        finally:
            self.hub.requests.append(Request(self.command, self.path, len(body)))
        if fault == "cut" or len(body) < length:
            # Lingering for 0 seconds makes the close a reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
        elif fault == "drop":
            self.close_connection = True
        elif fault == "stall":
            self.close_connection = True
            while not self.hub._closing.is_set() and not select.select([self.connection], [], [], 0.05)[0]:
                pass  # readable: the client has closed its end
        elif isinstance(fault, int | Fault):
            fault = Fault(fault) if isinstance(fault, int) else fault
            said = fault.body.encode() if isinstance(fault.body, str) else fault.body
            self.send(_Answer({"error": "A fault of the test."} if said is None else said, fault.status, fault.headers))
        else:
            answer = self.hub.answer(self.command, self.path, self.headers, body)
            if fault == "land_then_drop":
                self.close_connection = True
            else:
                self.send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = take

    def send(self, answer: _Answer) -> None:
        body, kind = answer.body, "application/octet-stream"
        if not isinstance(body, bytes):  # default=str: a card may hold a date
            body, kind = json.dumps(body, default=str).encode(), "application/json; charset=utf-8"
        self.send_response(answer.status)
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(body))} | answer.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Connections(ThreadingHTTPServer):
    """A thread per connection, and a list of those that are open, to end them with the server."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, handler: type[_Handler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.open: set[Any] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        self.close_request(request)  # without the polite shutdown before it, which would turn a reset into an end


class HubServer(_Endpoints):
    """
    A Hugging Face Hub on a free port of this machine. A context manager.

    A new repo holds one commit with `.gitattributes`, as on the Hub. There is one branch, main. Anything that the real
    Hub has and this one has not is answered with 501, which the client does not retry.

    Args:
        tokens (`dict`): Token → what it may: `name` of its user ("tester"), `role` ("read", "write" or "fineGrained"),
            `orgs` (name → role in it, where "read" may not write), and, of a fine-grained one, `writes`: the
            namespaces and repos that it may write.
        lfs_threshold (`int`): Bytes above which a file is in LFS whatever its name.
        part_size (`int`, *optional*): Objects above it are uploaded in parts of this size.

    Attributes:
        url (`str`): The client's `endpoint`, or `HF_ENDPOINT`.
        requests (`list[Request]`): Every request whose body has been read as far as it ever was.
        uploads (`list[str]`): The oid of every object that came in whole, in order: twice if it was sent twice.
        repos (`dict`): (models or datasets, id) → [`Repo`].
    """

    def __init__(
        self,
        tokens: dict[str, dict[str, Any]] | None = None,
        *,
        lfs_threshold: int = 10_000_000,
        part_size: int | None = None,
    ) -> None:
        super().__init__(tokens or {}, lfs_threshold, part_size)
        self.requests: list[Request] = []
        self._faults: list[tuple[str, deque[FaultKind]]] = []
        self._faults_lock = threading.Lock()
        self._closing = threading.Event()
        self._connections = _Connections(type("_HandlerOfOne", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._connections.server_address[1]}"

    def __enter__(self) -> "HubServer":
        serve = self._connections.serve_forever
        threading.Thread(target=serve, kwargs={"poll_interval": 0.02}, name="test hub", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.set()
        self._connections.shutdown()
        self._connections.server_close()
        for connection in list(self._connections.open):
            with suppress(OSError):  # it may just have ended by itself
                connection.shutdown(socket.SHUT_RDWR)

    def fail(self, match: str, *faults: FaultKind) -> None:
        """
        Lets the next matching requests fail, one after the other, each with the next of the faults.

        Args:
            match (`str`): "METHOD part-of-the-path", as in "PUT /lfs/" or "POST /commit/".
            faults: Each one of

                - a status or a [`Fault`]: this answer; the request has no effect;
                - "drop": the connection ends without an answer; the request has no effect;
                - "cut": the connection is reset when half of the request's body is read;
                - "stall": no answer until the client gives up, or the server ends;
                - "land_then_drop": the request takes effect, then the connection ends without an answer;
                - a function: called with the path when half of the body is read. It returns one of the others, or None
                  to go on as if nothing were. One that kills the client best returns "cut": what a small body still
                  had to send may be here already.
        """
        unknown = [fault for fault in faults if isinstance(fault, str) and fault not in FAULTS]
        if unknown or " /" not in match:
            raise ValueError(f"fail({match!r}, ...{unknown}): expected 'METHOD /path', and of strings only {FAULTS}.")
        with self._faults_lock:
            self._faults.append((match, deque(faults)))

    @property
    def faults_left(self) -> list[str]:
        """The `match` of every fault that no request has met yet."""
        with self._faults_lock:
            return [match for match, faults in self._faults for _ in faults]

    def _next_fault(self, request: str) -> Any:
        with self._faults_lock:
            for match, faults in self._faults:
                method, _, part = match.partition(" ")
                if faults and request.startswith(method + " ") and part in request.split(" ", 1)[1]:
                    return faults.popleft()
        return None

    def files(self, repo_id: str, repo_type: str = "model") -> dict[str, bytes]:
        """Path → content at the head of main, `.gitattributes` included."""
        head = self.repos[f"{repo_type}s", repo_id].head
        return {path: file.content for path, file in head.files.items()}

    def commits(self, repo_id: str, repo_type: str = "model") -> list[Commit]:
        """The commits of main, the newest last."""
        return list(self.repos[f"{repo_type}s", repo_id].commits)
