"""Publishing, with the real client, to a Hub on loopback that fails on request: whole, or not at all."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from hub_server import Fault, HubServer, check_card
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file

from sft_phi3v import card, hub, merge, run
from sft_phi3v.recipe import load_recipe

# The client itself sends files in a way that its HTTP library wants to be rid of.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TOKENS = {
    "hf_write": {"role": "write", "name": "me"},
    "hf_read": {"role": "read", "name": "me"},
    "hf_fine": {"role": "fineGrained", "name": "me", "writes": ["me/allowed"]},
    "hf_other": {"role": "write", "name": "other"},
}
REPOSITORY = Path(__file__).resolve().parents[1]
REPO = "me/model"
EMPTY = {".gitattributes"}
TABLE = "faults of the Hub, and what came of them"


@pytest.fixture
def server(waits, monkeypatch):
    monkeypatch.setattr(hub, "time", SimpleNamespace(sleep=waits.append))  # our own attempts do not wait either
    with HubServer(TOKENS) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # made once, with the endpoint of that time
        monkeypatch.setenv("HF_TOKEN", "hf_write")
        yield server


@pytest.fixture
def folder(merged_run, tmp_path):
    """A copy of the merged run, to be changed at will."""
    shutil.copytree(merged_run, tmp_path / "run")
    return tmp_path / "run"


def arguments(folder, **changes):
    keys = {"output_dir": folder, "hub_model_id": REPO, "license": "mit"} | changes
    return [str(folder / "recipe.yaml"), *(word for key, value in keys.items() for word in (f"--{key}", str(value)))]


def published(server, repo=REPO):
    return server.files(repo) if ("models", repo) in server.repos else {}


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_published_is_the_merged_folder_with_its_card(folder, server, capsys):
    hub.main(arguments(folder))
    found = published(server)
    text = found.pop("README.md").decode()
    pictures = {name for name in found if name.startswith("examples/")}
    assert {name: found[name] for name in found.keys() - pictures - EMPTY} == files_of(folder / "merged")
    assert len(pictures) == 3  # as many as rows were scored
    assert all(found[name] == (folder / name).read_bytes() for name in pictures)
    assert [commit.title for commit in server.commits(REPO)][1:] == ["merged, by sft_phi3v"]  # one commit
    assert server.repos[("models", REPO)].private
    told = capsys.readouterr().out
    assert f"published: {server.url}/{REPO} (private), commit {server.commits(REPO)[-1].id[:12]}" in told

    assert check_card(text) == ([], [])
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata["license"] == "mit"
    assert "base_model" not in metadata  # a folder here is no model on the Hub
    results = metadata["model-index"][0]["results"][0]
    assert {metric["name"] for metric in results["metrics"]} >= {"parsed", "stopped", "label exact", "label token_f1"}
    scores = json.loads((folder / "metrics.json").read_text())
    assert f"| after | 3 | {100 * scores['after']['parsed']:.1f}% |" in text
    for row in ("before", "baseline", "after, pictures shuffled", "trained", "merged"):
        assert f"| {row} | 3 |" in text
    for number, line in enumerate((folder / "completions.jsonl").read_text().splitlines(), start=1):
        line = json.loads(line)
        assert f"| ![](examples/{number}.jpg) | {line['reference']} | {line['after']['text']} |" in text
    assert yaml.safe_load(found["recipe.yaml"])["max_steps"] == 24  # as it was trained, not as this command says

    # Again: it is there already, and nothing is sent.
    sent, commits = len(server.uploads), len(server.commits(REPO))
    hub.main(arguments(folder))
    assert "holds exactly this already" in capsys.readouterr().out
    assert (len(server.uploads), len(server.commits(REPO))) == (sent, commits)


def test_nothing_of_this_machine_is_published(folder, server, pictures_folder):
    hub.main(arguments(folder, what="both"))
    for name, content in published(server).items():
        assert not name.endswith((".bin", ".pt", ".pkl")), name
        for path in (REPOSITORY, pictures_folder, folder, folder.parent):
            assert str(path).encode() not in content, name
        assert b"hf_write" not in content, name


def test_the_adapter_alone_and_both(folder, server):
    hub.main(arguments(folder, what="adapter", hub_model_id="me/adapter"))
    found = published(server, "me/adapter")
    assert found.keys() - EMPTY >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"}
    assert "model.safetensors" not in found and "merge_report.json" not in found
    assert found["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()
    assert "A LoRA adapter for tiny_base" in found["README.md"].decode()
    assert check_card(found["README.md"].decode()) == ([], [])

    hub.main(arguments(folder, what="both"))
    found = published(server)
    assert found["model.safetensors"] == (folder / "merged" / "model.safetensors").read_bytes()
    assert found["adapter/adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()
    # The merged model alone takes its place: what no longer belongs goes, in the same commit.
    hub.main(arguments(folder))
    assert not [name for name in published(server) if name.startswith("adapter/")]


def test_a_dry_run_shows_everything_and_needs_no_hub(folder, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hub, "HfApi", lambda **kwargs: pytest.fail("it went to the Hub"))
    hub.main(arguments(folder, dry_run="true"))
    told = capsys.readouterr().out
    assert f"merged → https://huggingface.co/{REPO} (private)" in told
    size = (folder / "merged" / "model.safetensors").stat().st_size / 1e3
    assert f"{size:,.1f} kB  model.safetensors" in told
    assert "model-index:" in told and "## Scores" in told
    assert "Nothing was published" in told


def test_round_trip_through_an_empty_cache(folder, server, tmp_path, tiny_processor, pictures_folder):
    """Pushed by one process, loaded by others from the Hub: the same logits, and it answers."""
    environment = os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_write",
        "OMP_NUM_THREADS": "1",
    }

    def python(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    python("-m", "sft_phi3v.hub", *arguments(folder, what="both"))
    load = """
import sys, torch
from PIL import Image
from safetensors.torch import save_file
from sft_phi3v.phi3_v import Phi3VForCausalLM, Phi3VProcessor
name, picture, output = sys.argv[1:]
processor = Phi3VProcessor.from_pretrained(name)
model = Phi3VForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
text = "<|user|>\\n<|image_1|>\\nWhat?<|end|>\\n<|assistant|>\\n"
inputs = processor(text=text, images=Image.open(picture), return_tensors="pt")
with torch.no_grad():
    save_file({"logits": model(**inputs).logits, "ids": inputs["input_ids"]}, output)
"""
    picture = next(pictures_folder.glob("*/*.png"))
    python("-c", load, REPO, str(picture), str(tmp_path / "hub"))
    python("-c", load, str(folder / "merged"), str(picture), str(tmp_path / "local"))
    from_hub, local = load_file(tmp_path / "hub"), load_file(tmp_path / "local")
    assert torch.equal(from_hub["ids"], local["ids"])
    assert torch.equal(from_hub["logits"], local["logits"])
    assert (tmp_path / "cache" / "hub" / "models--me--model").is_dir()

    answer = python("-m", "sft_phi3v.generate", "--model", REPO, str(picture))
    assert answer.strip()


# What the Hub does → how the first command ends ("" if it succeeds all the same).
FAULTS = [
    ("GET /api/whoami", [401], r"does not accept the token"),
    ("GET /api/whoami", [500, "drop", 429], ""),
    ("GET /api/whoami", [500] * 4, r"the Hub fails"),
    ("GET /api/models", [503], ""),
    ("POST /api/repos/create", [403], r"may not write to me/model"),
    ("POST /api/repos/create", [Fault(429, {"Retry-After": "7"})], ""),
    ("POST /api/repos/create", [Fault(429, {"Retry-After": "3600"})], r"asks to wait 3600 s"),
    ("POST /api/validate-yaml", [502], ""),
    ("POST /preupload/", [503, "drop"], ""),
    ("POST /preupload/", [404], r"has no me/model that this token may see"),
    ("POST /info/lfs/objects/batch", [500, Fault(429, {"Retry-After": "2"})], ""),
    ("POST /info/lfs/objects/batch", [403], r"may not write to me/model"),
    ("PUT /lfs/", ["cut", 503, "drop"], ""),
    ("PUT /lfs/", [403], r"may not write to me/model"),
    ("PUT /lfs/", ["cut"] * 200, r"cannot be reached"),
    ("POST /info/lfs/objects/verify", [500], ""),
    ("POST /commit/", [500, 503], ""),
    ("POST /commit/", ["drop"], ""),
    ("POST /commit/", ["land_then_drop"], ""),
    ("POST /commit/", [Fault(429, {"Retry-After": "5"})], ""),
    ("POST /commit/", [409], ""),
    ("POST /commit/", [412], r"somebody else changed me/model"),
    ("POST /commit/", [401], r"does not accept the token"),
    ("POST /commit/", [503] * 4, r"the Hub fails"),
    ("POST /commit/", ["drop"] * 4, r"cannot be reached"),
]


def in_words(fault):
    return f"{fault.status} {fault.headers}" if isinstance(fault, Fault) else str(fault)


@pytest.mark.parametrize(
    ("match", "faults", "message"),
    FAULTS,
    ids=[f"{match.split('/')[-2 if match.endswith('/') else -1]}-{len(f)}x{in_words(f[0])}" for match, f, _ in FAULTS],
)
def test_whatever_fails_nothing_is_half_published(match, faults, message, folder, server, waits, table_row, capsys):
    server.fail(match, *faults)
    shown = ", ".join(in_words(fault) for fault in faults[:3]) + (
        f" … ({len(faults)} times)" if len(faults) > 3 else ""
    )
    if message:
        with pytest.raises(SystemExit) as end:
            hub.main(arguments(folder))
        told = str(end.value)
        assert told.startswith("error: Not published: ") and re.search(message, told), told
        assert "Nothing is half published. Type the same command again" in told
        assert published(server).keys() <= EMPTY
        while server.faults_left:  # those that were not met
            server._next_fault(match)
        hub.main(arguments(folder))  # the same again
        outcome = re.search(r"Not published: (.*?)[.(]", told)[1].strip()
        outcome = f"refused: {outcome}; again: published"
    else:
        hub.main(arguments(folder))
        outcome = "published"
    for fault in faults:
        if isinstance(fault, Fault) and not message:
            assert any(wait >= int(fault.headers["Retry-After"]) for wait in waits)
    assert published(server)["model.safetensors"] == (folder / "merged" / "model.safetensors").read_bytes()
    assert len(server.commits(REPO)) == 2
    assert len(server.uploads) == len(set(server.uploads)), "a finished file was sent twice"
    table_row(TABLE, match, shown, outcome)


def test_a_hub_that_says_nothing_is_given_up(folder, server, monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT", 0.3)
    server.fail("GET /api/whoami", *["stall"] * 4)
    with pytest.raises(SystemExit, match=r"the Hub cannot be reached"):
        hub.main(arguments(folder))
    hub.main(arguments(folder))
    assert "model.safetensors" in published(server)


def test_killed_while_it_uploads_it_goes_on_from_there(finished_run, server, tmp_path, monkeypatch, table_row):
    folder, argv = finished_run
    monkeypatch.setattr(merge, "SHARD_SIZE", 1_000_000)
    merge.main(argv)
    environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_write"}
    command = [sys.executable, "-m", "sft_phi3v.hub", *arguments(folder)]
    running = []

    def kill(path):
        running[0].send_signal(signal.SIGKILL)
        running[0].wait(30)
        return "cut"

    server.fail("PUT /lfs/", None, None, kill)  # in the middle of the third file
    running.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    assert running[0].wait(120) == -signal.SIGKILL
    assert published(server).keys() <= EMPTY
    stored = list(server.uploads)
    assert len(stored) >= 1
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {name: content for name, content in published(server).items() if name.startswith("model")} == {
        path.name: path.read_bytes() for path in (folder / "merged").glob("model*")
    }
    assert len(server.uploads) == len(set(server.uploads)), "a finished file was sent twice"
    table_row(TABLE, "PUT /lfs/", "SIGKILL of the pushing process", "nothing visible; again: published")


def test_a_merge_that_changed_since_it_was_verified_is_refused(folder, server):
    path = folder / "merged" / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"][0, 0] += 0.125
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(SystemExit, match=r"model\.safetensors changed since the merged model was verified"):
        hub.main(arguments(folder))
    shutil.rmtree(folder / "merged")
    with pytest.raises(SystemExit, match=r"holds no merged model. Merge first: python -m sft_phi3v\.merge"):
        hub.main(arguments(folder))
    assert not server.requests


@pytest.mark.parametrize("name", ["added.txt", "config.json", "tokenizer.json"])
def test_so_is_a_file_that_was_added_removed_or_edited(name, folder, server):
    path = folder / "merged" / name
    path.unlink() if name == "tokenizer.json" else path.write_text("{}")
    with pytest.raises(SystemExit, match=rf"{re.escape(name)} changed since"):
        hub.main(arguments(folder))


def test_an_adapter_that_was_trained_on_since_is_refused(folder, server):
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: weight * 2 for name, weight in weights.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(SystemExit, match=r"adapter_model\.safetensors changed since"):
        hub.main(arguments(folder))


def test_a_merge_that_was_found_wrong_is_refused(folder, server):
    path = folder / "merged" / "merge_report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"verified": False, "problems": ["logits: far off"]}))
    with pytest.raises(SystemExit, match=r"was merged and found wrong: logits: far off"):
        hub.main(arguments(folder))


@pytest.mark.parametrize(
    ("changes", "token", "message"),
    [
        ({"hub_model_id": "null"}, "hf_write", r"`hub_model_id` is 'missing', expected the Hub id"),
        ({"hub_model_id": "model"}, "hf_write", r"`hub_model_id` is 'model', expected the Hub id .* with its owner"),
        ({"hub_model_id": "a/b/c"}, "hf_write", r"`hub_model_id` is 'a/b/c', expected the Hub id"),
        ({}, None, r"There is no token for the Hub. Log in with `hf auth login`, or set HF_TOKEN"),
        ({}, "hf_wrong", r"the Hub does not accept the token"),
        ({}, "hf_read", r"of me may only read"),
        ({}, "hf_other", r"the token may not write to me/model"),
        ({}, "hf_fine", r"the token may not write to me/model"),
    ],
)
def test_what_is_missing_is_one_clear_message(changes, token, message, folder, server, monkeypatch):
    monkeypatch.setattr(hub, "get_token", lambda: token)
    with pytest.raises(SystemExit, match=message):
        hub.main(arguments(folder, **changes))
    assert not published(server)
    assert not server.uploads


def test_without_a_licence_nothing_is_published(folder, server, monkeypatch):
    assert (
        "license: apache-2.0"
        in hub.publication(load_recipe(arguments(folder, license="null"))).files["README.md"].decode()
    )  # the base model's
    monkeypatch.setattr(card, "base_file", lambda *args: None)
    with pytest.raises(SystemExit, match=r"`license` is missing and the base model's card names none"):
        hub.main(arguments(folder, license="null"))
    assert not server.requests


def test_what_the_hub_does_not_accept_is_found_before_anything_is_sent(folder, server):
    with pytest.raises(SystemExit, match=r"(?i)invalid metadata"):
        hub.main(arguments(folder, license="Apache 2"))
    assert not server.uploads
    assert published(server).keys() <= EMPTY


def test_somebody_elses_commit_in_the_meantime_is_not_overwritten(folder, server):
    api = HfApi(endpoint=server.url, token="hf_write")

    def meanwhile(path):
        api.upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id=REPO)

    server.fail("POST /preupload/", meanwhile)
    with pytest.raises(SystemExit, match=r"somebody else changed me/model in the meantime"):
        hub.main(arguments(folder))
    assert published(server).keys() - EMPTY == {"notes.txt"}


def test_a_commit_that_the_hub_only_claims_is_noticed(folder, server):
    claim = json.dumps({"commitOid": "0" * 40, "commitUrl": f"{server.url}/{REPO}/commit/{'0' * 40}", "success": True})
    server.fail("POST /commit/", Fault(200, {"Content-Type": "application/json"}, claim.encode()))
    with pytest.raises(SystemExit, match=r"after the commit the Hub holds other content"):
        hub.main(arguments(folder))


def test_the_card_gives_other_weights_their_own_scores(finished_run, server):
    folder, argv = finished_run
    merge.main([*argv, "--merge_base", "original"])
    report = json.loads((folder / "merged" / "merge_report.json").read_text())
    report["scores"]["merged"]["fields"]["label"]["exact"] = 1 / 3  # as if the choice had cost two rows
    (folder / "merged" / "merge_report.json").write_text(json.dumps(report))
    hub.main(arguments(folder))
    text = published(server)["README.md"].decode()
    metrics = yaml.safe_load(text.split("---\n")[1])["model-index"][0]["results"][0]["metrics"]
    assert {metric["name"]: metric["value"] for metric in metrics}["label exact"] == 0.3333
    assert "after, pictures shuffled" not in text and "## Examples" not in text
    error = report["against_trained_model"]["relative_error"]
    assert f"against the model that was trained, the relative error of the logits is\n{100 * error:.2f} %" in text


def test_odd_answers_and_names_make_a_valid_card(folder, server):
    lines = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    for line in lines:
        line["after"]["text"] = "| <b>{{ 7 * 7 }}</b>\u2028\n---\n`x` ![a](b)"
    (folder / "completions.jsonl").write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    text = hub.publication(load_recipe(arguments(folder))).files["README.md"].decode()
    assert check_card(text) == ([], [])
    assert r"| \| \<b\>\{\{ 7 \* 7 \}\}\</b\> --- \`x\` !\[a\](b) |" in text


def test_a_repository_that_holds_something_else_is_left_alone(folder, server):
    api = HfApi(endpoint=server.url, token="hf_write")
    api.create_repo(REPO, private=True)
    mine = {"notes.txt": b"mine", "style_lora.safetensors": b"weights", "model.safetensors": b"old"}
    for name, content in mine.items():
        api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=REPO)
    with pytest.raises(SystemExit, match=r"me/model holds something else .*--replace true"):
        hub.main(arguments(folder))
    assert published(server)["notes.txt"] == b"mine"
    hub.main(arguments(folder, replace="true"))
    found = published(server)
    assert (found["notes.txt"], found["style_lora.safetensors"]) == (b"mine", b"weights")  # not ours to delete
    assert found["model.safetensors"] == (folder / "merged" / "model.safetensors").read_bytes()


def test_another_model_is_not_overwritten_and_an_earlier_version_is(folder, server):
    hub.main(arguments(folder))
    before = published(server)
    with pytest.raises(SystemExit, match=r"holds the merged model. Publish both"):
        hub.main(arguments(folder, what="adapter"))
    recipe = yaml.safe_load(before["recipe.yaml"])
    other = yaml.safe_dump(recipe | {"prompt": "Which city is this?"}).encode()
    api = HfApi(endpoint=server.url, token="hf_write")
    for broken in (b"- a list", b"\t: no yaml: [", other):
        api.upload_file(path_or_fileobj=broken, path_in_repo="recipe.yaml", repo_id=REPO)
        with pytest.raises(SystemExit, match=r"holds another model"):
            hub.main(arguments(folder))
    with pytest.raises(SystemExit, match=r"holds another model .prompt: 'Which city is this\?'."):
        hub.main(arguments(folder))
    api.upload_file(
        path_or_fileobj=yaml.safe_dump(recipe | {"seed": 7}).encode(), path_in_repo="recipe.yaml", repo_id=REPO
    )
    hub.main(arguments(folder))
    assert published(server) == before


def test_what_lies_there_is_read_patiently(folder, server, table_row):
    hub.main(arguments(folder))
    server.fail("HEAD /resolve/", "drop", 500)
    server.fail("GET /tree/", 503)
    hub.main(arguments(folder, what="both"))
    assert not server.faults_left
    assert "adapter/adapter_model.safetensors" in published(server)
    table_row(TABLE, "HEAD /resolve/, GET /tree/", "drop, 500, 503", "published")


def test_private_is_not_published_into_a_public_repository(folder, server):
    HfApi(endpoint=server.url, token="hf_write").create_repo(REPO, private=False)
    with pytest.raises(SystemExit, match=r"me/model is public, and the recipe publishes privately"):
        hub.main(arguments(folder))
    hub.main(arguments(folder, hub_private_repo="false"))
    assert "model.safetensors" in published(server)


def test_text_that_names_this_machine_or_a_secret_stops_it(folder, server, monkeypatch):
    lines = (folder / "completions.jsonl").read_text().splitlines()
    for planted, message in (
        (os.path.expanduser("~/private/file"), "the path .* of a machine"),
        ("see /home/alice/x", "the path '/home/alice' of a machine"),
        ("ghp_abcdefghijklmnopqrstuvwx", "what looks like a secret"),
        ("hf_abcdefghijklmnopqrstuvwx", "what looks like a secret"),
    ):
        found = [json.loads(line) for line in lines]
        found[0]["after"]["text"] = planted
        (folder / "completions.jsonl").write_text("\n".join(json.dumps(line) for line in found))
        with pytest.raises(SystemExit, match=rf"README\.md would publish {message}"):
            hub.main(arguments(folder, card_examples="3"))
    assert not server.requests


def test_push_to_hub_while_training_publishes_adapters_with_our_card(write_recipe, server, tmp_path, capsys):
    path = write_recipe(
        push_to_hub=True, hub_model_id=REPO, save_steps=2, max_steps=4, eval_rows=2, hub_always_push=True, license="mit"
    )
    torch.set_num_threads(1)
    server.fail("POST /commit/", 500)  # a checkpoint is not published: training goes on
    run.main([path])
    found = published(server)
    assert found["adapter_model.safetensors"] == (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert not [name for name in found if name.endswith(".bin") or "checkpoint" in name]
    assert b"/" not in found["recipe.yaml"].replace(REPO.encode(), b"")
    text = found["README.md"].decode()
    assert check_card(text) == ([], [])
    assert "| after | 2 |" in text
    assert server.repos[("models", REPO)].private
    titles = [commit.title for commit in server.commits(REPO)]
    assert titles[-1] == "With scores"
    told = capsys.readouterr().out
    assert "hub: this was not published: " in told


def test_training_refuses_a_repository_that_it_would_spoil(write_recipe, server):
    api = HfApi(endpoint=server.url, token="hf_write")
    api.create_repo("me/public", private=False)
    api.create_repo("me/other", private=True)
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id="me/other")
    for repo, message in (("me/public", "is public"), ("me/other", "holds something else")):
        with pytest.raises(SystemExit, match=message):
            run.main([write_recipe(push_to_hub=True, hub_model_id=repo)])


def test_checkpoints_with_pickles_are_not_published(write_recipe):
    with pytest.raises(SystemExit, match=r"`hub_strategy: all_checkpoints` is refused"):
        run.main([write_recipe(push_to_hub=True, hub_model_id=REPO, hub_strategy="all_checkpoints")])
