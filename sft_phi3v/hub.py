"""Publishing: the verified merged model, the adapter, or both, with a card, in one commit or not at all.

`python -m sft_phi3v.hub RECIPE`. Before a byte is sent, everything that could make the result wrong is refused: a merge
that was not verified or whose files changed since, a repository that holds something else, text that names this
machine. Weights are stored on the Hub first, where nobody sees them; then one commit makes all files appear at once.
So whatever fails in between publishes nothing, and typing the command again sends only what is not there yet.
"""

from sft_phi3v.usage import check_recipe

if __name__ == "__main__":
    check_recipe()  # before torch is imported

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

from sft_phi3v.card import HUB_ID, licence, render_card
from sft_phi3v.checkpoints import file_hashes
from sft_phi3v.evaluation import public_recipe, trained_folder, trained_hashes, trained_keys
from sft_phi3v.merge import REPORT
from sft_phi3v.model import first_line, run_file
from sft_phi3v.recipe import Recipe, as_text, load_recipe

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
# Of an earlier version these go when the new one has no such file: left there, they would be loaded instead. Everything
# else in a repository is somebody's.
OURS = re.compile(
    r"(adapter/)?adapter_(config\.json|model\.safetensors)|model(-\d{5}-of-\d{5})?\.safetensors|"
    rf"model\.safetensors\.index\.json|{re.escape(REPORT)}|examples/\d+\.jpg|"
    rf"adapter/({'|'.join(map(re.escape, PROCESSOR_FILES))})"
)
# Two recipes with the same values of these are versions of one model.
IDENTITY = ("model_name_or_path", "dataset_name", "datasets", "prompt", "answer")
SECRET = re.compile(
    rb"\b(hf_|gh[pousr]_|github_pat_|sk-|AKIA|xox[abp]-|glpat-)[A-Za-z0-9_-]{16,}|(?i:(api_?key|password|token)\W{1,3}\w{20,})"
)
HOME = re.compile(rb"(?<![\w.])(/home/|/Users/|[A-Z]:Users)[\w.-]+")  # backslashes are gone by then

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
        lines = [f"{self.size(name) / 1e3:>14,.1f} kB  {name}" for name in sorted(self.files)]
        total = sum(map(self.size, self.files))
        lines.append(f"{total / 1e3:>14,.1f} kB  in {len(self.files)} files")
        card = self.files["README.md"]
        assert isinstance(card, bytes)
        seen = "private" if self.private else "public"
        return "\n".join([f"{self.what} → https://huggingface.co/{self.repo} ({seen})", *lines, "", card.decode()])


def publication(recipe: Recipe) -> Publication:
    """
    Gathers what is to be published, and refuses what must not be. Needs no network, but for the licence of a base model
    on the Hub.

    Args:
        recipe ([`Recipe`]): The recipe of the run; `hub_model_id`, `hub_private_repo` and `what` say where and what.

    Returns:
        [`Publication`]: The files, and where they go.

    Raises:
        ValueError: No `hub_model_id`; nothing trained or merged; files that changed since they were verified; text that
            names this machine or holds a secret.
    """
    repo = recipe.training.hub_model_id
    if not repo or not HUB_ID.fullmatch(repo):
        raise ValueError(
            f"`hub_model_id` is {repo or 'missing'!r}, expected the Hub id to publish under, with its owner. Write it "
            "into the recipe, or add: --hub_model_id user/name"
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
    files.setdefault("recipe.yaml", public_recipe(recipe, folder).encode())
    if licence(recipe) is None:
        raise ValueError("`license` is missing and the base model's card names none. Write one, such as: license: mit")
    card = render_card(recipe, folder, repo=repo, adapter_only=what == "adapter", merge=report)
    files["README.md"] = card.encode()
    check_for_leaks(files, str(recipe.training.hub_token or get_token() or ""))
    return Publication(repo, recipe.training.hub_private_repo is not False, what, files, _identity(files))


def _identity(files: dict[str, Path | bytes]) -> dict[str, Any]:
    content = files["recipe.yaml"]
    keys = yaml.safe_load(content if isinstance(content, bytes) else content.read_bytes())
    return {key: keys.get(key) for key in IDENTITY}


def check_before_training(recipe: Recipe, repo: str) -> None:
    """
    What `push_to_hub: true` would be refused for later, or would do wrong.

    Args:
        recipe ([`Recipe`]): The recipe.
        repo (`str`): Hub id of the repository, which the trainer has made if there was none.

    Raises:
        ValueError: If it is public against the recipe, holds something else, or the recipe names this machine.
    """
    files: dict[str, Path | bytes] = {"recipe.yaml": as_text(recipe.public(), "recipe.yaml").encode()}
    check_for_leaks(files, str(recipe.training.hub_token or ""))
    private = recipe.training.hub_private_repo is not False
    api = HfApi(token=recipe.training.hub_token)
    wanted = Publication(repo, private, "adapter" if recipe.model.use_peft else "merged", files, _identity(files))
    check_target(api, patiently(lambda: api.model_info(repo)), wanted, replace=recipe.publish.replace)


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
        settings["base_model_name_or_path"] = trained_keys(recipe, folder)["model_name_or_path"]
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
        (folder, report["adapter"], trained_hashes(folder)),
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
    here = {str(Path.home()), os.getcwd(), tempfile.gettempdir()} - {"/"}
    for name, content in files.items():
        if Path(name).suffix in (".safetensors", ".jpg") or Path(name).name == "tokenizer.json":
            continue
        text = (content if isinstance(content, bytes) else content.read_bytes()).replace(b"\\", b"")  # of Markdown
        found = next((path for path in sorted(here) if re.search(re.escape(path.encode()) + rb"(?![\w-])", text)), None)
        if found is None and (home := HOME.search(text)):
            found = home[0].decode()
        if found or SECRET.search(text) or (token and token.encode() in text):
            what = f"the path {found!r} of a machine" if found else "what looks like a secret"
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
        check_token(api)
        info = find_repo(api, wanted.repo, private=wanted.private)
        check_target(api, info, wanted, replace=recipe.publish.replace)
        commit = upload(api, info, wanted)
    except FAILURES as error:
        raise ValueError(
            f"{_in_words(error, wanted.repo)}\nNothing is half published. Type the same command again: it looks what "
            "is there, and sends only what is missing."
        ) from error
    url = f"{api.endpoint}/{wanted.repo}"
    print(f"published: {url} ({'private' if info.private else 'public'}), commit {commit[:12]}")
    return url


def check_token(api: HfApi) -> None:
    """A `ValueError` if the token may only read; one that is not accepted fails as everything else does."""
    user = patiently(api.whoami)
    access = user.get("auth", {}).get("accessToken", {})
    if access.get("role") == "read":
        raise ValueError(
            f"The Hub token {access.get('displayName', '')!r} of {user['name']} may only read. Make one that may write "
            "(https://huggingface.co/settings/tokens) and log in with `hf auth login`."
        )


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
        before = _keys(Path(path))
    if other := [key for key, value in wanted.identity.items() if before.get(key) != value]:
        shown = ", ".join(f"{key}: {before.get(key)!r}" for key in other)
        raise ValueError(f"{info.id} holds another model ({shown}). {instead}")
    if wanted.what == "adapter" and any(re.fullmatch(r"model.*\.safetensors", name) for name in there):
        raise ValueError(f"{info.id} holds the merged model. Publish both (--what both), or: --replace true")


def _keys(path: Path) -> dict[str, Any]:
    """What somebody's recipe.yaml says; nothing, if it is none."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


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

    def commit() -> None:
        # Of a commit without an answer nobody knows whether it was made: look before trying, each time.
        changed, stale = differing(api, info.id, wanted)
        if not changed and not stale:
            print(f"{info.id} holds exactly this already.")
            return
        if stale:
            print(f"of an earlier version, and not in this one: {', '.join(stale)}")
        additions = [CommitOperationAdd(name, wanted.files[name]) for name in changed]
        deletions = [CommitOperationDelete(name) for name in stale]
        # Checks the card, stores large files where nobody sees them yet, except for those that are stored already, and
        # then commits.
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
        if name not in there or not _holds(there[name], wanted.size(name), content)
    ]
    return changed, sorted(name for name in there if name not in wanted.files and OURS.fullmatch(name))


def _holds(entry: RepoFile, size: int, content: Path | bytes) -> bool:
    if entry.size != size:
        return False
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        if entry.lfs is not None:
            return hashlib.file_digest(file, "sha256").hexdigest() == entry.lfs.sha256
        return hashlib.sha1(b"blob %d\0" % size + file.read()).hexdigest() == entry.blob_id  # as git names content


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
            print(f"the Hub: {first_line(_cause(error))}; trying again in {max(wait, after):.0f} s", flush=True)
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
    return f"Not published: {reason} ({first_line(_cause(error))})."


def main(argv: list[str] | None = None) -> None:
    """`python -m sft_phi3v.hub RECIPE [--key value …]`"""
    try:
        push(load_recipe(sys.argv[1:] if argv is None else argv))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted: nothing is half published. Type the same command again.") from None


if __name__ == "__main__":
    main()
