"""What lies on disk is whole or not there: files, checkpoints, and the folder of a run.

A checkpoint is written aside, hashed, flushed to the disk, listed in its `whole.json`, and renamed; only then may an
older one go:

    outputs/run/.saving/checkpoint-40/…      while it is written; whatever a cut leaves here is swept away
    outputs/run/checkpoint-40/whole.json     {"adapter_model.safetensors": "sha256 …", …}

So a run goes on from the newest checkpoint whose files are what `whole.json` says, on all machines.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from sft_phi3v.recipe import RESUMABLE, Recipe, differences, read_yaml

ASIDE = ".saving"  # in output_dir: the folder in which checkpoints are written
WHOLE = "whole.json"
CHECKPOINT = re.compile(r"checkpoint-\d+")
SHARED = "All machines of a run must see it under this path: put it on a disk that they share."
ROWS_PER_STEP = ("per_device_train_batch_size", "gradient_accumulation_steps")


def write_whole(path: Path, text: str) -> None:
    """Writes a file aside and renames it, so that whoever finds it finds all of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def file_hashes(folder: Path, *patterns: str) -> dict[str, str]:
    """SHA-256 of the files of a folder, by their paths in it."""
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    hashes = {}
    for path in files:
        with path.open("rb") as file:
            hashes[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def step_of(checkpoint: Path) -> int:
    """The number in a checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(folder: Path) -> list[Path]:
    """The `checkpoint-N` folders of a run, the newest first, whole or not."""
    found = [path for path in folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of, reverse=True)


def damage(checkpoint: Path) -> str | None:
    """
    What is wrong with a checkpoint.

    Args:
        checkpoint (`Path`): Its folder.

    Returns:
        `str` or `None`: The first file that is not as it was written, in words; `None` if the checkpoint is whole.
    """
    try:
        wanted = json.loads((checkpoint / WHOLE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"it has no {WHOLE}, which is written last"
    found = file_hashes(checkpoint, *wanted)
    for name, digest in wanted.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != digest:
            return f"{name} is not as it was written ({(checkpoint / name).stat().st_size:,} bytes)"
    return None


def finish(aside: Path, target: Path) -> None:
    """
    Makes a checkpoint of a folder whose files are all written: lists them, flushes them to the disk, and renames.

    Args:
        aside (`Path`): The folder, beside which the target's is.
        target (`Path`): `checkpoint-N`. One that is there already is replaced.
    """
    (aside / WHOLE).unlink(missing_ok=True)
    write_whole(aside / WHOLE, json.dumps(file_hashes(aside, "**/*"), indent=1) + "\n")
    for path in [*aside.rglob("*"), aside]:
        flush(path)
    replaced = aside.with_name(f"replaced-{target.name}")
    if target.exists():
        os.replace(target, replaced)
    os.replace(aside, target)
    flush(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def flush(path: Path) -> None:
    """A rename must not reach the disk before what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_room(folder: Path, needed: int, what: str, *, key: str = "output_dir") -> None:
    """
    Refuses to write what will not fit.

    Args:
        folder (`Path`): Where it will lie.
        needed (`int`): Bytes.
        what (`str`): What it is, in words.
        key (`str`, *optional*, defaults to `"output_dir"`): The recipe key that names the folder.

    Raises:
        ValueError: If the disk has less room.
    """
    if (free := room(folder)) < needed:
        raise ValueError(
            f"`{key}` {str(folder)!r}: {what} takes {needed / 1e6:,.1f} MB, and its disk has {free / 1e6:,.1f} MB "
            f"left. Make room, or give another `{key}`, on another disk; the same command then goes on."
        )


def room(folder: Path) -> int:
    """Bytes left on the disk that a folder lies on, or will lie on."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """
    Keeps a second run out of a folder. The kernel gives it free when this process ends, however it ends.

    Args:
        folder (`Path`): `output_dir`, made if need be.

    Raises:
        ValueError: If another run is at work there.
    """
    if not PartialState().is_main_process:
        yield
        return
    lock = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = lock.open("a+", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"`output_dir` is {str(folder)!r}, which cannot be written: {error.strerror}.") from error
    with opened as file:
        _lock(file, folder)
        try:
            yield
        finally:
            if [*folder.iterdir()] == [lock]:  # nothing came of it
                lock.unlink()
                folder.rmdir()


def _lock(file: IO[str], folder: Path) -> None:
    try:
        # Not flock(), which the workers that load pictures would inherit and outlive a killed run with.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            return  # a file system without locks
        file.seek(0)
        raise ValueError(
            f"`output_dir` {str(folder)!r} is in use: {file.read().strip() or 'another run'} is at work there. Wait "
            "for it, stop it, or give a fresh folder (--output_dir ...)."
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()


def resumed_from(recipe: Recipe) -> Path | None:
    """
    The checkpoint that a run goes on from; all processes have to call, and get the same.

    Without `resume_from_checkpoint` or with `auto`, a run goes on where its `output_dir` holds an unfinished one of the
    same recipe, up to the keys of [`~sft_phi3v.recipe.RESUMABLE`], and else starts. `true` or a path must be there.

    Args:
        recipe ([`~sft_phi3v.recipe.Recipe`]): The recipe.

    Returns:
        `Path` or `None`: A whole checkpoint; `None` to start from the beginning.

    Raises:
        ValueError: If the folder holds another run or a finished one, no checkpoint is whole, the recipe or the number
            of rows per step changed, or machines do not share the folder.
    """
    found: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            found[0] = _newest_whole(check_output_dir(recipe), named=recipe.resume not in (None, True, "auto"))
            if found[0] is None:
                _forget_others(Path(str(recipe.training.output_dir)), recipe)
        except ValueError as error:
            found[1] = str(error)
    checkpoint, problem = broadcast_object_list(found)
    if problem:
        raise ValueError(problem)
    if checkpoint is not None and not checkpoint.is_dir():
        raise ValueError(f"`output_dir`: process 0 sees {str(checkpoint)!r}, and this one does not. {SHARED}")
    return checkpoint


def _forget_others(folder: Path, recipe: Recipe) -> None:
    """Removes what was scored before training with another recipe, which got no further."""
    if changes(folder / "recipe.yaml", recipe):
        print(f"start: nothing was trained in {folder} yet; the recipe has changed, and it starts over", flush=True)
        for name in ("metrics.json", "completions.jsonl"):
            (folder / name).unlink(missing_ok=True)


def _newest_whole(candidates: list[Path], *, named: bool) -> Path | None:
    """The first checkpoint that is whole. Damaged ones get another name, so that no later rotation counts them."""
    for checkpoint in candidates:
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        print(f"resume: {checkpoint} is damaged and not used: {problem}", flush=True)
        if not named:
            put_aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
            shutil.rmtree(put_aside, ignore_errors=True)
            os.replace(checkpoint, put_aside)
    if candidates:
        raise ValueError(
            f"none of the checkpoints {', '.join(map(str, candidates))} is whole. Give another one "
            "(--resume_from_checkpoint PATH), or a fresh folder (--output_dir ...) to start over."
        )
    return None


def check_shared(folder: Path, *, key: str = "output_dir") -> None:
    """
    Refuses an `output_dir` that the other machines of a run do not see: they could not go on from its checkpoints.

    Args:
        folder (`Path`): `output_dir`, made if need be.
        key (`str`, *optional*, defaults to `"output_dir"`): The recipe key that names the folder.

    Raises:
        ValueError: On the machines that do not share it.
    """
    state = PartialState()
    if state.num_processes == 1:
        return
    [name] = broadcast_object_list([f".shared-{os.getpid()}-{time.time_ns()}"])
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    state.wait_for_everyone()
    seen = (folder / name).exists()
    state.wait_for_everyone()
    if state.is_main_process:
        (folder / name).unlink()
    if not seen:
        raise ValueError(f"`{key}` {str(folder)!r} on {socket.gethostname()} is not process 0's. {SHARED}")


def check_output_dir(recipe: Recipe) -> list[Path]:
    """
    Refuses an `output_dir` that already holds another run, so that no result is overwritten or mixed.

    Args:
        recipe ([`~sft_phi3v.recipe.Recipe`]): The recipe.

    Returns:
        `list[Path]`: The checkpoints to go on from, the best first; none to start from the beginning.

    Raises:
        ValueError: As [`resumed_from`].
    """
    folder, given = Path(str(recipe.training.output_dir)), recipe.resume
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`output_dir` is {str(folder)!r}, which is a file, expected a folder.")
    own = checkpoints(folder)
    wanted = _wanted(given, folder, own)
    if wanted:
        _check_same_run(wanted[0], recipe)
        if wanted[0].absolute().parent.resolve() == folder.resolve():
            return wanted
    saved = folder / "recipe.yaml"
    traces = ("checkpoint-*", "adapter_*", "*.safetensors", "metrics.json", "completions.jsonl")
    found = sorted({file.name for trace in traces for file in folder.glob(trace)})
    diff, over = _diff(saved, recipe), _is_over(folder)
    begun = bool(own or over or [*folder.glob("adapter_model.safetensors"), *folder.glob("model*.safetensors")])
    if not (begun if saved.is_file() else found):
        return wanted
    resumable = own and saved.is_file() and not diff
    if resumable and not over and given in (None, "auto"):
        _check_rows_per_step(folder, recipe)
        return own
    whose = f"a run of {'another' if diff else 'this'} recipe{', which is over' if over and not diff else ''}"
    reason = f"{whose} ({saved}):{diff}" if diff else f"{whose}. "
    if not saved.is_file():
        reason = f"a run ({', '.join(found[:3])}). "
    resume = "continue that run (--resume_from_checkpoint true), " if resumable or (own and not saved.is_file()) else ""
    raise ValueError(
        f"`output_dir` {str(folder)!r} already holds {reason}Give a fresh folder (--output_dir ...), {resume}or remove "
        "the folder to start over."
    )


def _wanted(given: bool | str | None, folder: Path, own: list[Path]) -> list[Path]:
    """The checkpoints that `resume_from_checkpoint` asks for, which must be there; none if it leaves it open."""
    if given is True and not own:
        raise ValueError(
            f"`resume_from_checkpoint` is given and `output_dir` {str(folder)!r} holds no checkpoint-* folder to "
            "resume from. Remove the key to start, or give the path of a checkpoint."
        )
    if not isinstance(given, str) or given == "auto":
        return own if given is True else []
    if not Path(given).is_dir() or not CHECKPOINT.fullmatch(Path(given).absolute().name):
        raise ValueError(
            f"`resume_from_checkpoint` is {given!r}, which is no such folder, expected a checkpoint-* folder, auto, or "
            f"true for the last one in {str(folder)!r} (there: {', '.join(path.name for path in own) or 'none'})."
        )
    return [Path(given)]


def _is_over(folder: Path) -> bool:
    """Whether a run has come to its end."""
    environment = folder / "environment.json"
    return environment.is_file() and '"finished": true' in environment.read_text(encoding="utf-8")


def finished(folder: Path) -> None:
    """Notes that a run has come to its end: there is nothing left of it to go on with."""
    path = folder / "environment.json"
    environment = json.loads(path.read_text(encoding="utf-8")) | {"finished": True}
    write_whole(path, json.dumps(environment, indent=2) + "\n")


def changes(saved: Path, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """The keys in which a saved recipe differs from this one, each with what it was and is; no key without a file."""
    before = read_yaml(str(saved)) if saved.is_file() else {}
    now = recipe.dump()
    return {key: (before.get(key), now.get(key)) for key in differences(saved, recipe)}


def _diff(saved: Path, recipe: Recipe) -> str:
    """The changes that make it another run, a line each."""
    lines = [
        f"\n  {key}: {json.dumps(was)} → {json.dumps(now)}"
        for key, (was, now) in changes(saved, recipe).items()
        if not RESUMABLE.fullmatch(key)
    ]
    return "".join([*lines, "\n"]) if lines else ""


def _check_same_run(checkpoint: Path, recipe: Recipe) -> None:
    """Refuses a checkpoint of another recipe; its own is in it, or beside it where it was the run's alone to keep."""
    folder = checkpoint if (checkpoint / "recipe.yaml").is_file() else checkpoint.absolute().parent
    if not (folder / "recipe.yaml").is_file():
        raise ValueError(
            f"`resume_from_checkpoint`: {str(checkpoint)!r} has no recipe.yaml in it: nothing says what it is of. Give "
            "a checkpoint that this program wrote."
        )
    if diff := _diff(folder / "recipe.yaml", recipe):
        raise ValueError(
            f"`resume_from_checkpoint`: another recipe began that run ({folder / 'recipe.yaml'}):{diff}Put these back "
            "as they were, or start a new run in a fresh folder (--output_dir ...)."
        )
    _check_rows_per_step(folder, recipe)


def _check_rows_per_step(folder: Path, recipe: Recipe) -> None:
    """Rows may be spread over processes in another way, but a step must be of as many: it says where the data are."""
    saved, environment = folder / "recipe.yaml", folder / "environment.json"
    if not (saved.is_file() and environment.is_file()):
        return
    keys, recorded = read_yaml(str(saved)), json.loads(environment.read_text(encoding="utf-8"))
    processes = PartialState().num_processes
    if recipe.task.max_tokens_per_batch is not None:
        moved = {"gradient_accumulation_steps"} & {*changes(saved, recipe)}
        moved |= {"the number of processes"} if recorded["processes"] != processes else set()
        if moved:
            raise ValueError(
                f"`resume_from_checkpoint` with `max_tokens_per_batch`: batches are planned for "
                f"{', '.join(sorted(moved))}, which changed. Put this back as it was, or start a new run in a fresh "
                "folder (--output_dir ...)."
            )
        return
    before, now = recorded["processes"], processes
    for key in ROWS_PER_STEP:
        value = getattr(recipe.training, key)
        before, now = before * (keys.get(key) or type(recipe.training).__dataclass_fields__[key].default), now * value
    if before != now:
        raise ValueError(
            f"`resume_from_checkpoint`: a step of that run is of {before} rows, of this one {now} ({processes} "
            f"processes × {' × '.join(ROWS_PER_STEP)}). Change these so that their product stays, or start a new run "
            "in a fresh folder (--output_dir ...)."
        )
    if recipe.script.dataset_streaming:
        moved = {"dataloader_num_workers", "per_device_train_batch_size"} & {*changes(saved, recipe)}
        moved |= {"the number of processes"} if recorded["processes"] != processes else set()
        if moved:
            raise ValueError(
                "`resume_from_checkpoint` with `dataset_streaming`: rows are shared out by "
                f"{', '.join(sorted(moved))}, which changed. Put this back as it was, or start a new run in a fresh "
                "folder (--output_dir ...)."
            )
