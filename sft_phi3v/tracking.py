"""What trackers see: numbers, the recipe, and pictures with what the model made of them; never a secret or a path.

`report_to` names the trackers, as in transformers, whose callbacks do the work. They are kept from two things here:
from stopping a run that is going well, and from the whole of `SFTConfig`, in which paths of this machine stand. W&B
also gets a table of pictures, the same rows at each evaluation, and, if `WANDB_LOG_MODEL` says so, the model.
"""

import copy
import json
import os
import resource
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import WandbCallback
from transformers.integrations.integration_utils import WandbLogModel, get_reporting_integration_callbacks
from trl import SFTConfig

from sft_phi3v import STARTED
from sft_phi3v.checkpoints import write_whole
from sft_phi3v.collator import IGNORED
from sft_phi3v.evaluation import Evaluation, short_row, thumbnail
from sft_phi3v.model import first_line
from sft_phi3v.recipe import Recipe
from sft_phi3v.scoring import Completion

RUN_IDS = "tracking.json"  # in output_dir: the W&B run that a resumed run, and its merge, go on with
EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]


class Launch:
    """What the seconds went into that passed between the start of this process and its first step of training."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._last = STARTED

    def passed(self, part: str) -> None:
        """Counts all time since the last call as this part's."""
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + now - self._last
        self._last = now

    @property
    def seconds(self) -> float:
        """All parts together."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.parts.items())
        return f"started: first step after {self.seconds:.1f} s ({parts})"


class Meter(TrainerCallback):
    """
    Counts what training takes in, and how long it waits for it.

    `tokens_per_second` and the like are of training steps alone: evaluating and saving do not count.

    Attributes:
        launch ([`Launch`], *optional*): Is said, and counted, once the first step is done.
    """

    def __init__(self) -> None:
        self.supervised = 0
        self.launch: Launch | None = None
        self._launched: dict[str, float] = {}
        self._clear()

    def _clear(self) -> None:
        self._counts: list[torch.Tensor] = []
        self._pictures = 0
        self._waited = self._seconds = 0.0

    def on_train_begin(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for entry in state.log_history:  # of a resumed run
            self.supervised = int(entry.get("num_supervised_tokens", self.supervised))

    def on_step_end(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._seconds += time.perf_counter() - self._start
        if self.launch is not None:
            self.launch.passed("first step")
            self._launched = {"time_to_first_step": self.launch.seconds}
            if state.is_world_process_zero:
                tqdm.write(str(self.launch))
            self.launch = None

    def fetched(self, batches: Sequence[Mapping[str, torch.Tensor]], start: float) -> None:
        """Takes note of the batches of one step, for which was waited from `start` on (`time.perf_counter`)."""
        self._start = start
        self._waited += time.perf_counter() - start
        for batch in batches:  # summed where they are: reading the sums now would wait for the GPU
            labels = batch["labels"]
            tokens = batch.get("attention_mask", torch.ones_like(labels)).sum()  # without a mask nothing is padding
            self._counts.append(torch.stack([tokens, (labels != IGNORED).sum()]))
            self._pictures += len(batch.get("image_sizes", ()))

    def take(self) -> dict[str, float]:
        """What was measured since the last time, of all processes together; each of them has to call."""
        tokens, supervised = torch.stack(self._counts).sum(dim=0).tolist() if self._counts else (0, 0)
        if torch.cuda.is_available():
            memory = torch.cuda.max_memory_allocated()
        else:
            memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        own = (tokens, supervised, self._pictures, self._waited, self._seconds, memory)
        tokens, supervised, pictures, waited, seconds, memories = zip(*gather_object([own]), strict=True)
        self.supervised += sum(supervised)
        self._clear()
        launched, self._launched = self._launched, {}
        elapsed = max(sum(seconds) / len(seconds), 1e-9)
        return launched | {
            "tokens_per_second": sum(tokens) / elapsed,
            "supervised_tokens_per_second": sum(supervised) / elapsed,
            "pictures_per_second": sum(pictures) / elapsed,
            "num_supervised_tokens": self.supervised,
            "data_wait": sum(waited) / max(sum(seconds), 1e-9),
            "peak_memory_gb": max(memories) / 1e9,
        }


class WandB(WandbCallback):
    """transformers' callback with a run that holds no path or code, and that is found again after a crash."""

    def __init__(self, folder: Path, resumed: Path | None):
        super().__init__()
        self.wanted = WandbLogModel(os.environ.get("WANDB_LOG_MODEL", "false"))
        # transformers would log the pickled arguments, with the Hub's token: what is logged is said by `artifact`.
        self._log_model = WandbLogModel.FALSE
        self.folder, self.resumed = folder, resumed
        self._unshown: list[tuple[Sequence[str], Sequence[Sequence[Any]], int]] = []  # of before the run had begun

    def setup(self, args: SFTConfig, state: TrainerState, model: Any, **kwargs: Any) -> None:
        self._initialized = True
        if not state.is_world_process_zero:
            return
        if self._wandb.run is None:
            self.start(os.environ.get("WANDB_PROJECT", args.project), args.run_name)
        self._wandb.config.update(args.to_dict(), allow_val_change=True)
        self._wandb.define_metric("train/global_step")
        self._wandb.define_metric("*", step_metric="train/global_step", step_sync=True)
        if (watched := os.environ.get("WANDB_WATCH", "false")) in ("all", "parameters", "gradients"):
            self._wandb.watch(model, log=watched, log_freq=max(100, state.logging_steps))
        for table in self._unshown:
            self.table(*table)

    def start(self, project: str, name: str | None) -> None:
        """Begins a run in `WANDB_DIR` or beside the other results, or goes on with the one that was cut."""
        record, before = self.folder / RUN_IDS, (self.resumed or self.folder) / RUN_IDS
        known = json.loads(before.read_text(encoding="utf-8")) if self.resumed and before.is_file() else {}
        run_id = os.environ.get("WANDB_RUN_ID") or known.get("wandb") or secrets.token_hex(4)
        write_whole(record, json.dumps({"wandb": run_id, "project": project}) + "\n")
        settings = self._wandb.Settings(
            console="off", disable_git=True, save_code=False, x_disable_meta=True, x_disable_machine_info=True
        )
        folder = os.environ.get("WANDB_DIR", str(self.folder))
        os.environ.setdefault("WANDB_DATA_DIR", str(Path(folder, "wandb")))  # where files wait to be uploaded
        self._wandb.init(project=project, name=name, id=run_id, resume="allow", dir=folder, settings=settings)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Logs rows, whose pictures become W&B's, under `completions`."""
        if not self._initialized:
            self._unshown.append((columns, rows, step))
            return
        cells = [[self._wandb.Image(cell, file_type="jpg") if hasattr(cell, "save") else cell for cell in row]
                 for row in rows]  # fmt: skip
        self._wandb.log({"completions": self._wandb.Table([*columns], cells), "train/global_step": step})

    def artifact(self, kind: str, files: Mapping[str, Path | bytes], aliases: Sequence[str]) -> None:
        """Logs the files of a model: `adapter`, or `merged`."""
        found = self._wandb.Artifact(f"{kind}-{self._wandb.run.id}", type="model")
        for name, content in files.items():
            if isinstance(content, Path):
                found.add_file(str(content), name=name)
            else:
                with found.new_file(name, mode="wb") as file:
                    file.write(content)
        self._wandb.run.log_artifact(found, aliases=[*aliases])

    def close(self) -> None:
        """Ends the run, so that all of it is written."""
        self._wandb.finish()


class Tracking(TrainerCallback):
    """
    All trackers of a run. One that fails is left out from then on, which is said once; training goes on.

    Args:
        recipe ([`Recipe`]): Its `report_to` names them.
        checkpoint (`Path`, *optional*): What the run goes on from, and W&B's run with it.

    Attributes:
        environment (`dict`): What the run runs on; logged beside the recipe.

    Raises:
        ValueError: If a tracker is unknown or not installed.
    """

    def __init__(self, recipe: Recipe, checkpoint: Path | None = None):
        self.recipe = recipe.public()
        self.environment: dict[str, Any] = {}
        self._over = False
        self._end: Callable[[], None] = lambda: None
        folder = Path(str(recipe.training.output_dir))
        self.trackers: list[TrainerCallback] = []
        try:
            for kind in get_reporting_integration_callbacks(recipe.training.report_to):
                self.trackers.append(WandB(folder, checkpoint) if kind is WandbCallback else kind())
        except (RuntimeError, ImportError, ValueError) as error:
            raise ValueError(f"`report_to` is {recipe.training.report_to}: {error}") from error

    def on_event(
        self, event: str, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Passes an event of training on; its end only when the scores are logged as well ([`Tracking.finish`])."""
        if event == "on_train_end" and not self._over:
            self._end = partial(self.on_event, event, args, state, control, **kwargs)
            return
        if not self.trackers:
            return
        public = copy.copy(args)
        public.to_dict = self.config
        public.to_json_string = lambda: json.dumps(self.config(), default=str)
        # The model's configuration says where it was loaded from; only W&B, which does not look there, gets the model.
        bare = kwargs | ({"model": SimpleNamespace(config=None)} if "model" in kwargs else {})

        def passed_on(tracker: TrainerCallback) -> None:
            given = kwargs if isinstance(tracker, WandB) else bare
            getattr(tracker, event)(public, state, control, **given)

        self._each(passed_on)

    def config(self) -> dict[str, Any]:
        """What trackers may know of the run: the resolved recipe, and what it runs on."""
        environment = {key: value for key, value in self.environment.items() if key != "local_paths"}
        return self.recipe | {"environment": environment}

    def show(self, evaluation: Evaluation, completions: Sequence[Completion], label: str, step: int) -> None:
        """
        Logs pictures with what the model made of them, of the same rows each time.

        Args:
            evaluation ([`Evaluation`]): Knows the rows; those of its `sample` are shown.
            completions (sequence of [`Completion`]): Of the sample's rows.
            label (`str`): Which model wrote them.
            step (`int`): After how many steps.
        """
        if not any(isinstance(tracker, WandB) for tracker in self.trackers):
            return
        scorer = evaluation.scorer
        scores, errors = scorer.main_values(completions), scorer.errors(completions)
        columns = ["model", "step", "row", "picture", "reference", "completion", "stopped"]
        columns += [f"{field}: {what}" for field in scorer.fields for what in ("right", "error")]
        rows = []
        for place, (index, completion) in enumerate(zip(evaluation.sample, completions, strict=True)):
            images = evaluation.examples[index]["images"]
            values = [float(of[field][place]) for field in scorer.fields for of in (scores, errors)]
            picture = thumbnail(images[0]) if images else None
            texts = [completion.reference, completion.text, completion.stopped]
            rows.append([label, step, short_row(completion.row), picture, *texts, *values])
        self._each_wandb(lambda wandb: wandb.table(columns, rows, step))

    def log_model(self, kind: str, files: Callable[[], Mapping[str, Path | bytes]], when: str, alias: str) -> None:
        """
        Logs a model, if `WANDB_LOG_MODEL` wants it.

        Args:
            kind (`str`): `adapter`, `model` or `merged`.
            files (`Callable`): Gives the files, by name.
            when (`str`): `end` or `checkpoint`: at which of W&B's settings; at `checkpoint` the end is logged too.
            alias (`str`): Such as `best`.
        """

        def logged(wandb: WandB) -> None:
            if wandb.wanted == WandbLogModel.CHECKPOINT or wandb.wanted.value == when:
                wandb.artifact(kind, files(), [alias])

        self._each_wandb(logged)

    def finish(self) -> None:
        """Says that training is over, and ends W&B's run, so that all of it is written."""
        self._over = True
        self._end()
        self._each_wandb(lambda wandb: wandb.close())

    def _each_wandb(self, act: Callable[[WandB], Any]) -> None:
        self._each(lambda tracker: act(tracker) if isinstance(tracker, WandB) else None)

    def _each(self, act: Callable[[TrainerCallback], Any]) -> None:
        for tracker in [*self.trackers]:
            try:
                act(tracker)
            except Exception as error:
                self.trackers.remove(tracker)
                _say_failed(type(tracker).__name__.removesuffix("Callback"), error)


def _say_failed(name: str, error: Exception) -> None:
    print(f"tracking: {name} failed and is left out from here on: {first_line(error)}", flush=True)


def _passing_on(event: str) -> Callable[..., None]:
    return lambda self, args, state, control, **kwargs: self.on_event(event, args, state, control, **kwargs)


for _event in EVENTS:
    setattr(Tracking, _event, _passing_on(_event))


def log_merged(recipe: Recipe, folder: Path) -> None:
    """Logs a merged model to the run that trained it, if the recipe reports to W&B and `WANDB_LOG_MODEL` wants it."""
    record = Path(str(recipe.training.output_dir), RUN_IDS)
    if "wandb" not in recipe.training.report_to or not record.is_file() or recipe.publish.adapter:
        return  # what `adapter` names need not be of that run
    try:
        wandb = WandB(record.parent, resumed=record.parent)
        if wandb.wanted.is_enabled:
            wandb.start(json.loads(record.read_text(encoding="utf-8"))["project"], recipe.training.run_name)
            files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
            wandb.artifact("merged", files, ["merged"])
            wandb.close()
    except Exception as error:  # it is merged, whatever W&B says
        _say_failed("WandB", error)
