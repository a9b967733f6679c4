"""The Hub for tests does to the real client what the real Hub does, and each of its faults what it says."""

import hashlib
import os
import signal
import subprocess
import sys
import time

import httpx2
import pytest
from hub_server import Fault, HubServer, check_card
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, _commit_api, hf_hub_download
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# The client itself sends files in a way that its HTTP library wants to be rid of.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

CARD = "---\nlicense: mit\n---\n# A model\n"
WEIGHTS = bytes(range(256)) * 1000
TOKENS = {
    "hf_write": {"role": "write", "name": "me", "orgs": {"team": "write", "club": "read"}},
    "hf_read": {"role": "read", "name": "me"},
    "hf_fine": {"role": "fineGrained", "name": "me", "writes": ["me/allowed"]},
    "hf_other": {"role": "write", "name": "other"},
}


@pytest.fixture
def server(waits):
    with HubServer(TOKENS) as server:
        yield server


@pytest.fixture
def api(server):
    return HfApi(endpoint=server.url, token="hf_write")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text(CARD)
    (folder / "sub" / "model.safetensors").write_bytes(WEIGHTS)
    return folder


def add(path: str, content: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, content)


def count(server: HubServer, method: str, part: str) -> int:
    return sum(request.method == method and part in request.path for request in server.requests)


def test_who_may_what(server, api):
    assert api.whoami()["orgs"] == [
        {"type": "org", "name": "team", "roleInOrg": "write"},
        {"type": "org", "name": "club", "roleInOrg": "read"},
    ]
    assert api.whoami(token="hf_fine")["auth"]["accessToken"]["fineGrained"]["scoped"][0]["entity"] == {
        "type": "model",
        "name": "me/allowed",
    }
    with pytest.raises(HfHubHTTPError, match="Invalid user token") as caught:
        api.whoami(token="hf_unknown")
    assert caught.value.response.status_code == 401
    assert api.create_repo("team/model", token="hf_write").repo_id == "team/model"
    assert api.create_repo("me/allowed", token="hf_fine").repo_id == "me/allowed"
    for repo, token in (("me/x", "hf_read"), ("club/x", "hf_write"), ("me/x", "hf_fine"), ("me/x", "hf_other")):
        with pytest.raises(HfHubHTTPError, match="rights to create") as caught:
            api.create_repo(repo, token=token)
        assert caught.value.response.status_code == 403


def test_create_twice(api):
    assert api.create_repo("me/model").repo_id == "me/model"
    assert api.create_repo("model", exist_ok=True).repo_id == "me/model"
    with pytest.raises(HfHubHTTPError, match="already created") as caught:
        api.create_repo("me/model")
    assert caught.value.response.status_code == 409


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_upload_and_download(server, api, folder, tmp_path, repo_type):
    api.create_repo("me/repo", repo_type=repo_type)
    commit = api.upload_folder(repo_id="me/repo", folder_path=folder, repo_type=repo_type, commit_message="First")
    expected = {"config.json": b"{}", "README.md": CARD.encode(), "sub/model.safetensors": WEIGHTS}
    files = server.files("me/repo", repo_type)
    assert files.pop(".gitattributes") and files == expected
    assert server.uploads == [hashlib.sha256(WEIGHTS).hexdigest()]
    assert [each.title for each in server.commits("me/repo", repo_type)] == ["initial commit", "First"]
    assert [each.title for each in api.list_repo_commits("me/repo", repo_type=repo_type)] == ["First", "initial commit"]
    assert api.list_repo_refs("me/repo", repo_type=repo_type).branches[0].target_commit == commit.oid

    cache = tmp_path / "cache"
    got = api.snapshot_download("me/repo", repo_type=repo_type, cache_dir=cache)
    for name, content in expected.items():
        with open(os.path.join(got, name), "rb") as file:
            assert file.read() == content
    info = api.repo_info("me/repo", repo_type=repo_type, files_metadata=True)
    assert info.sha == commit.oid and not info.private and info.card_data.license == "mit"
    sizes = {it.rfilename: it.size for it in info.siblings}
    assert sizes["sub/model.safetensors"] == len(WEIGHTS)
    sent = len(server.requests)
    assert api.snapshot_download("me/repo", repo_type=repo_type, cache_dir=cache, revision=commit.oid) == got
    assert len(server.requests) == sent


def test_a_second_upload_sends_no_large_file(server, api, folder):
    api.create_repo("me/model")
    first = api.upload_folder(repo_id="me/model", folder_path=folder)
    again = api.upload_folder(repo_id="me/model", folder_path=folder)
    assert again.oid == first.oid  # nothing has changed: no commit
    (folder / "config.json").write_text("[]")
    (folder / "copy.safetensors").write_bytes(WEIGHTS)
    api.upload_folder(repo_id="me/model", folder_path=folder)
    assert server.files("me/model")["copy.safetensors"] == WEIGHTS
    assert len(server.uploads) == count(server, "PUT", "/lfs/") == 1
    assert len(server.commits("me/model")) == 3


def test_in_parts(waits, folder):
    with HubServer(TOKENS, part_size=100_000) as server:
        api = HfApi(endpoint=server.url, token="hf_write")
        api.create_repo("me/model")
        server.fail("PUT /lfs/", 503)
        api.upload_folder(repo_id="me/model", folder_path=folder)
        sent = [int(it.path.rsplit("/", 1)[1]) for it in server.requests if it.method == "PUT"]
        assert sent == [1, 1, 2, 3]  # only the part that failed came again
        assert len(server.uploads) == 1
        assert server.files("me/model")["sub/model.safetensors"] == WEIGHTS


def test_commits(server, api):
    api.create_repo("me/model")
    old = server.commits("me/model")[0].id
    api.create_commit("me/model", [add("a/x.txt", b"x"), add("a/y.txt", b"y"), add("b.txt", b"b")], commit_message="1")
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
        api.create_commit("me/model", [add("c.txt", b"c")], commit_message="2", parent_commit=old)
    assert caught.value.response.status_code == 412
    head = server.commits("me/model")[-1].id
    api.create_commit("me/model", [CommitOperationDelete("a/")], commit_message="2", parent_commit=head)
    assert set(server.files("me/model")) == {".gitattributes", "b.txt"}
    with pytest.raises(RemoteEntryNotFoundError):
        api.delete_file("nowhere.txt", "me/model")
    with pytest.raises(HfHubHTTPError, match="Pull requests are disabled"):
        api.upload_file(path_or_fileobj=b"c", path_in_repo="c.txt", repo_id="me/model", create_pr=True)
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(path_or_fileobj=b"c", path_in_repo="c.txt", repo_id="me/model", revision="elsewhere")
    with pytest.raises(HfHubHTTPError, match="write token"):
        api.upload_file(path_or_fileobj=b"c", path_in_repo="c.txt", repo_id="me/model", token="hf_other")
    assert len(server.commits("me/model")) == 3


def test_commits_that_break_the_rules(server, api, monkeypatch):
    """What the client would not send by itself: a file of which it did not upload the bytes, and a bad card."""
    api.create_repo("me/model")
    monkeypatch.setattr(api, "_validate_yaml", lambda *args, **keys: None)
    monkeypatch.setattr(_commit_api, "_upload_files", lambda **keys: None)
    with pytest.raises(BadRequestError, match="points to a file that does not exist"):
        api.create_commit("me/model", [add("model.safetensors", b"weights")], commit_message="1")
    with pytest.raises(BadRequestError, match='"license" with value "none"'):
        api.create_commit("me/model", [add("README.md", b"---\nlicense: none\n---\n")], commit_message="2")
    assert len(server.commits("me/model")) == 1


def test_look_ups(server, api, folder, tmp_path):
    api.create_repo("me/model")
    api.upload_folder(repo_id="me/model", folder_path=folder)
    api.upload_file(path_or_fileobj=b"[]", path_in_repo="config.json", repo_id="me/model", commit_message="Change")
    names = [".gitattributes", "README.md", "config.json", "sub"]
    assert [it.path for it in api.list_repo_tree("me/model")] == names
    assert [it.path for it in api.list_repo_tree("me/model", recursive=True)] == [*names, "sub/model.safetensors"]
    (inside,) = api.list_repo_tree("me/model", "sub", expand=True)
    assert inside.lfs.size == len(WEIGHTS) and inside.last_commit.title == "Upload folder using huggingface_hub"
    found = api.get_paths_info("me/model", ["config.json", "sub", "absent"], expand=True)
    assert [it.path for it in found] == ["config.json", "sub"] and found[0].last_commit.title == "Change"
    assert api.file_exists("me/model", "config.json") and not api.file_exists("me/model", "absent")
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download("me/model", "absent", cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download("me/model", "config.json", revision="absent", cache_dir=tmp_path)
    url = f"{server.url}/me/model/resolve/main/sub/model.safetensors"
    part = httpx2.get(url, headers={"Range": "bytes=10-19"})
    assert part.status_code == 206 and part.content == WEIGHTS[10:20]
    assert httpx2.get(f"{server.url}/api/models/me/model/nonsense").status_code == 501


def test_private_repo_is_invisible(server, api, folder, tmp_path):
    api.create_repo("me/model", private=True)
    api.upload_folder(repo_id="me/model", folder_path=folder)
    assert api.model_info("me/model").private
    assert api.hf_hub_download("me/model", "config.json", cache_dir=tmp_path / "mine", token="hf_read")
    for token in (False, "hf_other"):
        with pytest.raises(RepositoryNotFoundError) as caught:
            api.model_info("me/model", token=token)
        assert caught.value.response.status_code == 404
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("me/model", "config.json", cache_dir=tmp_path, token=token, endpoint=server.url)
        with pytest.raises(RepositoryNotFoundError):
            api.upload_file(path_or_fileobj=b"c", path_in_repo="c.txt", repo_id="me/model", token=token)


def test_statuses_in_order(server, api, folder, waits):
    api.create_repo("me/model")
    server.fail("PUT /lfs/", 500, Fault(429, {"Retry-After": "7"}), Fault(503, {}, "Overloaded"))
    api.upload_folder(repo_id="me/model", folder_path=folder)
    assert waits == [1, 8.0, 4] and not server.faults_left
    assert count(server, "PUT", "/lfs/") == 4 and len(server.uploads) == 1
    server.fail("POST /preupload/", 403)
    server.fail("GET /whoami-v2", 500)
    with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
        api.upload_folder(repo_id="me/model", folder_path=folder)
    with pytest.raises(HfHubHTTPError, match="500"):  # not retried
        api.whoami()
    with pytest.raises(ValueError, match="stal"):
        server.fail("PUT /lfs/", "stal")


def test_drop_and_cut_of_an_upload_are_retried(server, api, folder, waits):
    api.create_repo("me/model")
    server.fail("PUT /lfs/", "drop", "cut")
    api.upload_folder(repo_id="me/model", folder_path=folder)
    puts = [request.received for request in server.requests if request.method == "PUT"]
    assert puts == [len(WEIGHTS), len(WEIGHTS) // 2, len(WEIGHTS)]
    assert len(server.uploads) == 1 and waits == [1, 2]


def test_commit_that_lands_unanswered(server, api, folder, waits):
    api.create_repo("me/model")
    server.fail("POST /commit/", "drop", "land_then_drop")
    with pytest.raises(httpx2.RemoteProtocolError):
        api.upload_folder(repo_id="me/model", folder_path=folder)
    assert len(server.commits("me/model")) == 1
    with pytest.raises(httpx2.RemoteProtocolError):
        api.upload_folder(repo_id="me/model", folder_path=folder)
    assert len(server.commits("me/model")) == 2 and waits == []
    assert server.files("me/model")["sub/model.safetensors"] == WEIGHTS


def test_stall(server):
    server.fail("GET /whoami-v2", "stall", "stall")
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.get(f"{server.url}/api/whoami-v2", timeout=0.2)
    client = subprocess.Popen(
        [sys.executable, "-c", f"import urllib.request as r; r.urlopen({server.url + '/api/whoami-v2'!r})"],
        stderr=subprocess.DEVNULL,
    )
    while len(server.requests) < 2:
        time.sleep(0.01)
    started = time.monotonic()
    server.__exit__()
    assert time.monotonic() - started < 2
    assert client.wait(timeout=10) == 1


def test_kill_in_the_middle_of_an_upload(server, api, folder):
    api.create_repo("me/model")
    code = f"import huggingface_hub as h; h.upload_folder(repo_id='me/model', folder_path={str(folder)!r})"
    environment = {"HF_ENDPOINT": server.url, "HF_TOKEN": "hf_write", "HF_HUB_DISABLE_XET": "1"}

    def kill(path: str) -> str:
        os.kill(client.pid, signal.SIGKILL)
        return "cut"

    server.fail("PUT /lfs/", kill)
    client = subprocess.Popen([sys.executable, "-c", code], env=os.environ | environment)
    assert client.wait(timeout=60) == -signal.SIGKILL
    assert server.uploads == [] and len(server.commits("me/model")) == 1
    assert server.requests[-1].received == len(WEIGHTS) // 2


def test_card_by_its_endpoint(api):
    api.create_repo("me/model")
    with pytest.raises(ValueError, match=r"Invalid metadata(.|\n)*license"):
        api.upload_file(path_or_fileobj=b"---\nlicense: none\n---\n", path_in_repo="README.md", repo_id="me/model")
    with pytest.warns(UserWarning, match="empty or missing yaml"):
        api.upload_file(path_or_fileobj=b"# No metadata", path_in_repo="README.md", repo_id="me/model")


RESULT = (
    "task: {type: image-text-to-text}, dataset: {type: imagefolder, name: Own}, metrics: [{type: anls, value: 0.5}]"
)


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        ("license: mit\nlanguage: [en, deu]\ntags: [a]\nbase_model: microsoft/Phi-3.5-vision-instruct", None),
        ("base_model: [a/b, gpt2]\nbase_model_relation: adapter\npipeline_tag: image-text-to-text", None),
        (f"model-index: [{{name: m, results: [{{{RESULT}}}]}}]", None),
        ("license: Apache 2", '"license" with value "Apache 2" must be one of'),
        ("language: English", '"language" with value "English" is not valid'),
        ("language: xx", '"language" with value "xx" is not valid'),
        ("tags: vision", '"tags" must be an array'),
        ("tags: [1]", '"tags" with value "1" must be a string'),
        ("base_model: /models/phi", '"base_model" with value "/models/phi" is not valid'),
        ("base_model: ./phi", '"base_model" with value "./phi" is not valid'),
        ("base_model: out/run/merged", '"base_model" with value "out/run/merged" is not valid'),
        ("base_model_relation: child", '"base_model_relation" with value "child" must be one of'),
        ("model-index: [{results: []}]", '"model-index[0].name" is required'),
        ("model-index: [{name: m}]", '"model-index[0].results" must be an array'),
        (f"model-index: [{{name: m, results: [{{{RESULT.replace('value: 0.5', 'value: high')}}}]}}]", "a number"),
        (f"model-index: [{{name: m, results: [{{{RESULT.replace('value: 0.5', 'value: .nan')}}}]}}]", "a number"),
        (f"model-index: [{{name: m, results: [{{{RESULT.replace(', name: Own', '')}}}]}}]", "dataset.name"),
        ("tags: [", "cannot be parsed"),
        ("- a", "must be of type object"),
    ],
)
def test_metadata_rules(metadata, error):
    errors, warnings = check_card(f"---\n{metadata}\n---\nText")
    assert not warnings and bool(errors) == bool(error)
    assert error is None or any(error in each for each in errors)


def test_metadata_warnings():
    assert check_card("---\npipeline_tag: photo-to-word\n---\n")[1][0].startswith('The pipeline tag "photo-to-word"')
    assert (
        check_card("---\n---\n") == check_card("No metadata") == ([], ["empty or missing yaml metadata in repo card"])
    )
