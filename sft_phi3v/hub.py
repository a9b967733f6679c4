"""Publishing: the verified merged model, the adapter, or both, with a card, in one commit or not at all.

`python -m sft_phi3v.hub RECIPE`. Before a byte is sent, everything that could make the result wrong is refused: a merge
that was not verified or whose files changed since, a repository that holds something else, text that names this
machine. Weights are stored on the Hub first, where nobody sees them; then one commit makes all files appear at once.
So whatever fails in between publishes nothing, and typing the command again sends only what is not there yet.
"""

import hashlib
import io
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    constants,
    get_token,
    set_client_factory,
)
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from sft_phi3v.card import licence, render_card
from sft_phi3v.evaluation import run_file, trained_folder
from sft_phi3v.merge import REPORT, file_hashes
from sft_phi3v.recipe import Recipe, load_recipe

T = TypeVar("T")

# What an adapter needs, beside a base model. Nothing pickled: training_args.bin holds paths, and may hold a token.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
WHOLE_FILES = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")
PROCESSOR_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
# Files of an earlier version that go when a new one has none of that name. Others in the repository are not ours.
OURS = re.compile(
    r"(adapter/)?(adapter_config\.json|[\w.-]+\.safetensors(\.index\.json)?|(generation_)?config\.json|recipe\.yaml|"
    rf"{re.escape(REPORT)}|training_args\.bin|examples/\d+\.jpg|"
    rf"{'|'.join(map(re.escape, PROCESSOR_FILES))})"
)
# Two recipes with the same values of these are versions of one model.
IDENTITY = ("model_name_or_path", "dataset_name", "datasets", "prompt", "answer")
SECRET = re.compile(rb"\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|(?i:wandb_api_key\W+\w{20,})")

TIMEOUT = 60.0  # seconds without a byte; the client's own is none at all
WAITS = (1, 4, 15)  # seconds before another attempt at what the client itself does not try again
PATIENCE = 300  # most seconds that a Retry-After may ask for
PASSING = {408, 409, 425, 429, 500, 502, 503, 504}
# The client wraps failed uploads and downloads into these; JSONDecodeError is what a proxy's error page ends in.
WRAPPED = (RuntimeError, LocalEntryNotFoundError)
FAILURES = (HfHubHTTPError, httpx2.HTTPError, json.JSONDecodeError, *WRAPPED)


@dataclass(frozen=True)
class Publication:
    """
    What is to be published.

    Args:
        repo (`str`): Hub id.
        private (`bool`): Whether a new repository is private.
        what (`str`): `merged`, `adapter` or `both`.
        files (`dict[str, Path | bytes]`): Name in the repository → file, or its content.
        identity (`dict[str, Any]`): What makes another version the same model.
    """

    repo: str
    private: bool
    what: str
    files: dict[str, Path | bytes]
    identity: dict[str, Any]

    def size(self, name: str) -> int:
        """Bytes of a file."""
        content = self.files[name]
        return len(content) if isinstance(content, bytes) else content.stat().st_size

    def table(self) -> str:
        """Every file with its size, the target and the card, for people."""
        lines = [f"{self.size(name) / 1e6:>12,.3f} MB  {name}" for name in sorted(self.files)]
        total = sum(map(self.size, self.files))
        lines.append(f"{total / 1e6:>12,.3f} MB  in {len(self.files)} files")
        card = self.files["README.md"]
        assert isinstance(card, bytes)
        seen = "private" if self.private else "public"
        return "\n".join([f"{self.what} → https://huggingface.co/{self.repo} ({seen})", *lines, "", card.decode()])


def publication(recipe: Recipe) -> Publication:
    """
    Gathers what is to be published, and refuses what must not be. Needs no network.

    Args:
        recipe ([`Recipe`]): The recipe of the run; `hub_model_id`, `hub_private_repo` and `what` say where and what.

    Returns:
        [`Publication`]: The files, and where they go.

    Raises:
        ValueError: No `hub_model_id`; nothing trained or merged; files that changed since they were verified; text that
            names this machine or holds a secret.
    """
    repo = recipe.training.hub_model_id
    if not repo or not re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", repo):
        raise ValueError(
            f"`hub_model_id` is {repo or 'missing'!r}, expected the Hub id to publish under. Write it into the recipe, "
            "or add: --hub_model_id user/name"
        )
    what, folder = recipe.publish.what, trained_folder(recipe)
    if what != "merged" and not (folder / "adapter_config.json").is_file():
        raise ValueError(f"`what: {what}`: {str(folder)!r} holds no adapter: every weight was trained. Write merged.")
    files: dict[str, Path | bytes] = {}
    report = None
    if what != "adapter":
        merged = Path(str(recipe.training.output_dir)) / "merged"
        report = verified_report(recipe, merged, folder)
        files |= {path.relative_to(merged).as_posix(): path for path in merged.rglob("*") if path.is_file()}
    if what != "merged":
        place = "adapter/" if what == "both" else ""
        files |= {f"{place}{name}": content for name, content in trained_files(recipe, folder).items()}
    for picture in sorted(run_file(folder, "examples").glob("*.jpg")) if recipe.publish.card_examples else []:
        files[f"examples/{picture.name}"] = picture
    files.setdefault("recipe.yaml", recipe.text(public=True).encode())
    if licence(recipe) is None:
        raise ValueError("`license` is missing and the base model's card names none. Write one, such as: license: mit")
    card = render_card(recipe, folder, repo=repo, adapter_only=what == "adapter", merge=report)
    files["README.md"] = card.encode()
    check_for_leaks(files, str(recipe.training.hub_token or get_token() or ""))
    identity = {key: recipe.public().get(key) for key in IDENTITY}
    return Publication(repo, recipe.training.hub_private_repo is not False, what, files, identity)


def trained_files(recipe: Recipe, folder: Path) -> dict[str, Path | bytes]:
    """
    Args:
        recipe ([`Recipe`]): The recipe of the run.
        folder (`Path`): Holds the adapter, or all weights of a full fine-tuning, and the processor.

    Returns:
        `dict[str, Path | bytes]`: What others need of it; the adapter's record of its base without a local path.
    """
    record = folder / "adapter_config.json"
    names = ADAPTER_FILES if record.is_file() else WHOLE_FILES
    files: dict[str, Path | bytes] = {
        path.name: path for name in (*names, *PROCESSOR_FILES) for path in sorted(folder.glob(name))
    }
    if record.is_file():
        settings = json.loads(record.read_text(encoding="utf-8"))
        settings["base_model_name_or_path"] = recipe.public()["model_name_or_path"]
        files[record.name] = json.dumps(settings, indent=2).encode()
    return files


def verified_report(recipe: Recipe, merged: Path, folder: Path) -> dict[str, Any]:
    """
    The merge report, if it is of these very files.

    Args:
        recipe ([`Recipe`]): The recipe of the run.
        merged (`Path`): The merged folder.
        folder (`Path`): The adapter that it must be made of.

    Returns:
        `dict`: The report.

    Raises:
        ValueError: If there is no merged model, it was not verified, or a file of it or the adapter changed since.
    """
    command = f"python -m sft_phi3v.merge {recipe.path}"
    if not (merged / REPORT).is_file():
        raise ValueError(f"{str(merged)!r} holds no merged model. Merge first: {command}")
    report: dict[str, Any] = json.loads((merged / REPORT).read_text(encoding="utf-8"))
    if not report["verified"]:
        raise ValueError(f"{str(merged)!r} was merged and found wrong: {'; '.join(report['problems'])}. Run: {command}")
    for where, hashes, now in (
        (merged, report["files"], {name: sha for name, sha in file_hashes(merged, "**/*").items() if name != REPORT}),
        (folder, report["adapter"], file_hashes(folder, *ADAPTER_FILES, "model*.safetensors")),
    ):
        if changed := sorted(name for name in hashes.keys() | now.keys() if hashes.get(name) != now.get(name)):
            raise ValueError(
                f"{where}: {', '.join(changed[:3])} changed since the merged model was verified: what would be "
                f"published is not what was checked. Merge again: {command}"
            )
    return report


def check_for_leaks(files: dict[str, Path | bytes], token: str = "") -> None:
    """
    Refuses text that names a path of this machine or holds a secret.

    Args:
        files (`dict[str, Path | bytes]`): What would be published.
        token (`str`, *optional*): The Hub token in use.

    Raises:
        ValueError: Names the file and what is in it.
    """
    here = {str(Path.home()), os.getcwd(), tempfile.gettempdir()} - {"/", ""}
    for name, content in files.items():
        if Path(name).suffix in (".safetensors", ".jpg") or Path(name).name == "tokenizer.json":
            continue
        text = (content if isinstance(content, bytes) else content.read_bytes()).replace(b"\\", b"")  # of Markdown
        found = next((path for path in sorted(here) if re.search(re.escape(path.encode()) + rb"(?![\w-])", text)), None)
        if found or SECRET.search(text) or (token and token.encode() in text):
            what = f"the path {found!r} of this machine" if found else "what looks like a secret"
            raise ValueError(f"{name} would publish {what}. Take it out of the recipe or the rows that it comes from.")


def push(recipe: Recipe) -> str | None:
    """
    Publishes, or with `dry_run` shows what would be published.

    Args:
        recipe ([`Recipe`]): The recipe of the run.

    Returns:
        `str` or `None`: The address of what was published.

    Raises:
        ValueError: If anything of [`publication`] is wrong, or the Hub refuses or fails; nothing is half published.
    """
    wanted = publication(recipe)
    if recipe.publish.dry_run:
        print(f"{wanted.table()}\nNothing was published: this was a dry run.")
        return None
    token = recipe.training.hub_token or get_token()
    if not token:
        raise ValueError("There is no token for the Hub. Log in with `hf auth login`, or set HF_TOKEN.")
    if constants.HF_HUB_OFFLINE:
        raise ValueError("HF_HUB_OFFLINE is set, so the Hub cannot be reached. Unset it.")
    set_client_factory(lambda: httpx2.Client(follow_redirects=True, timeout=TIMEOUT))
    api = HfApi(token=token)
    try:
        repo = check_token(api, wanted.repo)
        info = find_repo(api, repo, private=wanted.private)
        check_target(api, info, wanted, replace=recipe.publish.replace)
        commit = upload(api, info, wanted)
    except FAILURES as error:
        raise ValueError(
            f"{_in_words(error, wanted.repo)}\nNothing is half published. Type the same command again: it looks what "
            "is there, and sends only what is missing."
        ) from error
    url = f"{api.endpoint}/{repo}"
    print(f"published: {url} ({'private' if info.private else 'public'}), commit {commit[:12]}")
    return url


def check_token(api: HfApi, repo: str) -> str:
    """
    Args:
        api (`HfApi`): With the token.
        repo (`str`): Hub id, with or without an owner.

    Returns:
        `str`: The whole id; the token's user owns what names no owner.

    Raises:
        ValueError: If the token may only read.
    """
    user = patiently(api.whoami)
    access = user.get("auth", {}).get("accessToken", {})
    if access.get("role") == "read":
        raise ValueError(
            f"The Hub token {access.get('displayName', '')!r} of {user['name']} may only read. Make one that may write "
            "(https://huggingface.co/settings/tokens) and log in with `hf auth login`."
        )
    return repo if "/" in repo else f"{user['name']}/{repo}"


def find_repo(api: HfApi, repo: str, *, private: bool) -> ModelInfo:
    """The repository as it is; made if it is not there."""
    try:
        return patiently(lambda: api.model_info(repo))
    except RepositoryNotFoundError:
        patiently(lambda: api.create_repo(repo, private=private, exist_ok=True))
        return patiently(lambda: api.model_info(repo))


def check_target(api: HfApi, info: ModelInfo, wanted: Publication, *, replace: bool) -> None:
    """
    Refuses a repository that is public against the recipe, or holds something else than an earlier version.

    Args:
        api (`HfApi`): With the token.
        info (`ModelInfo`): The repository.
        wanted ([`Publication`]): What is to be published.
        replace (`bool`): Whether to take the place of something else.

    Raises:
        ValueError: Says what is there, and how to publish all the same.
    """
    if wanted.private and not info.private:
        raise ValueError(
            f"{info.id} is public, and the recipe publishes privately. Make it private on the Hub, or write "
            "hub_private_repo: false"
        )
    there = {file.rfilename for file in info.siblings or []} - {".gitattributes"}
    if replace or not there:
        return
    instead = "Give another `hub_model_id`, or publish over it: --replace true"
    if "recipe.yaml" not in there:
        raise ValueError(f"{info.id} holds something else ({', '.join(sorted(there)[:3])}). {instead}")
    with tempfile.TemporaryDirectory() as folder:
        path = patiently(lambda: api.hf_hub_download(info.id, "recipe.yaml", revision=info.sha, local_dir=folder))
        before = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if other := [key for key, value in wanted.identity.items() if before.get(key) != value]:
        shown = ", ".join(f"{key}: {before.get(key)!r}" for key in other)
        raise ValueError(f"{info.id} holds another model ({shown}). {instead}")
    if wanted.what == "adapter" and any(re.fullmatch(r"model.*\.safetensors", name) for name in there):
        raise ValueError(f"{info.id} holds the merged model. Publish both (--what both), or: --replace true")


def upload(api: HfApi, info: ModelInfo, wanted: Publication) -> str:
    """
    Brings the repository to what is wanted, in one commit.

    Args:
        api (`HfApi`): With the token.
        info (`ModelInfo`): The repository, at the commit that was checked.
        wanted ([`Publication`]): What is to be there.

    Returns:
        `str`: The commit at which everything is there; the hash of each file on the Hub was compared.
    """
    changed, stale = differing(api, info.id, wanted)
    if not changed and not stale:
        print(f"{info.id} holds exactly this already.")
        return str(info.sha)
    additions = [CommitOperationAdd(name, for_client(wanted.files[name])) for name in changed]
    deletions = [CommitOperationDelete(name) for name in stale]
    if stale:
        print(f"of an earlier version, and not in this one: {', '.join(stale)}")
    # Large files first, where nobody sees them yet. The operations remember what is stored.
    patiently(lambda: api.preupload_lfs_files(info.id, additions, free_memory=False))

    def commit() -> None:
        # The client does not try a commit again, and of one without an answer nobody knows whether it was made.
        if differing(api, info.id, wanted) != ([], []):
            api.create_commit(
                info.id, [*additions, *deletions], commit_message=f"{wanted.what}, by sft_phi3v", parent_commit=info.sha
            )

    patiently(commit)
    if left := differing(api, info.id, wanted)[0]:
        raise ValueError(f"{info.id}: after the commit the Hub holds other content of {', '.join(left[:3])}.")
    return str(patiently(lambda: api.model_info(info.id)).sha)


def differing(api: HfApi, repo: str, wanted: Publication) -> tuple[list[str], list[str]]:
    """
    Args:
        api (`HfApi`): With the token.
        repo (`str`): Hub id.
        wanted ([`Publication`]): What is to be there.

    Returns:
        `tuple[list[str], list[str]]`: Files that are not there, or with other content; files of ours that are too many.
    """
    found = patiently(lambda: list(api.list_repo_tree(repo, recursive=True)))
    there = {entry.path: entry for entry in found if isinstance(entry, RepoFile)}
    changed = [
        name
        for name, content in sorted(wanted.files.items())
        if name not in there or not _same(there[name], wanted.size(name), content)
    ]
    return changed, sorted(name for name in there if name not in wanted.files and OURS.fullmatch(name))


def _same(entry: RepoFile, size: int, content: Path | bytes) -> bool:
    if entry.size != size:
        return False
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        if entry.lfs is not None:
            return hashlib.file_digest(file, "sha256").hexdigest() == entry.lfs.sha256
        return hashlib.sha1(b"blob %d\0" % size + file.read()).hexdigest() == entry.blob_id  # as git names content


def for_client(content: Path | bytes) -> str | bytes:
    """As `CommitOperationAdd` takes it."""
    return content if isinstance(content, bytes) else str(content)


def patiently(call: Callable[[], T]) -> T:
    """Tries again, after waiting, what fails for a passing reason; the client itself does so for uploads only."""
    for wait in WAITS:
        try:
            return call()
        except FAILURES as error:
            status, after = _status(error)
            if isinstance(error, RuntimeError) and error.__cause__ is None:
                raise  # not of an upload: a defect
            if (status is not None and status not in PASSING) or max(wait, after) > PATIENCE:
                raise
            print(f"the Hub: {_first_line(error)}; trying again in {max(wait, after):.0f} s", flush=True)
            time.sleep(max(wait, after))
    return call()


def _status(error: BaseException) -> tuple[int | None, float]:
    """HTTP status, and the seconds that the Hub asks to wait. No status: it did not answer, or not as it should."""
    cause = _cause(error)
    if not isinstance(cause, HfHubHTTPError):
        return None, 0.0
    after = cause.response.headers.get("Retry-After", "")
    return cause.response.status_code, float(after) if after.isdigit() else 0.0


def _cause(error: BaseException) -> BaseException:
    return error.__cause__ if isinstance(error, WRAPPED) and error.__cause__ else error


def _first_line(error: BaseException) -> str:
    cause = _cause(error)
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


def _in_words(error: BaseException, repo: str) -> str:
    status, after = _status(error)
    reasons = {
        401: "the Hub does not accept the token. Log in again with `hf auth login`, or set HF_TOKEN",
        403: f"the token may not write to {repo}. Give it that right, or another `hub_model_id`",
        404: f"the Hub has no {repo} that this token may see",
        412: f"somebody else changed {repo} in the meantime",
        429: f"the Hub has had too many requests{f', and asks to wait {after:.0f} s' if after else ''}",
    }
    reason = reasons.get(status or 0, "the Hub cannot be reached" if status is None else "the Hub fails")
    return f"Not published: {reason} ({_first_line(error)})."


def main(argv: list[str] | None = None) -> None:
    """`python -m sft_phi3v.hub RECIPE [--key value …]`"""
    try:
        push(load_recipe(sys.argv[1:] if argv is None else argv))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
