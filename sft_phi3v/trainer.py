"""TRL's trainer, with what a run needs that must not go wrong silently, and must not be lost.

Rows that only fill up a batch are not learned from, a loss that is no number stops the run by name, checkpoints are
whole or not there, and whoever asks the run to stop gets a checkpoint of the step that it was at.
"""

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object
from huggingface_hub import CommitOperationAdd, HfApi
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, HubStrategy, TrainOutput, rotate_checkpoints, seed_worker
from transformers.utils import PushInProgress
from trl import SFTTrainer

from sft_phi3v.batches import Plan, Planned
from sft_phi3v.card import render_card
from sft_phi3v.checkpoints import ASIDE, check_room, checkpoints, damage, finish, write_whole
from sft_phi3v.collator import IGNORED, only_supervised, row_numbers
from sft_phi3v.estimate import Shape
from sft_phi3v.evaluation import Evaluation, public_recipe
from sft_phi3v.fit import oom_message
from sft_phi3v.hub import check_for_leaks, trained_files
from sft_phi3v.interruption import INTERRUPTION, Halted, Interrupted, undisturbed
from sft_phi3v.model import checkpoint_layers, first_line
from sft_phi3v.recipe import Recipe
from sft_phi3v.scoring import Completion
from sft_phi3v.streaming import Stream
from sft_phi3v.tracking import RUN_IDS, Meter, Tracking

DUE = "evaluation_due"  # in a checkpoint of a run that was stopped before it had evaluated the checkpoint's step
MOST_SKIPPED = 10  # steps in a row that `nonfinite: skip` leaves out: then the weights are at fault, not the rows
SHOWN = 20  # rows that a message names
MOMENTS = 3  # of each trained number: itself and AdamW's two


class Checkpointing(TrainerCallback):
    """So many layers recompute: transformers tells all of them to, each time that training begins."""

    def __init__(self, layers: int):
        self.layers = layers

    def on_train_begin(self, *args: Any, model: Any, **kwargs: Any) -> None:
        checkpoint_layers(model, self.layers)


class Trainer(SFTTrainer):
    """TRL's trainer, with an evaluation loss that is a mean over supervised tokens, and with our card.

    A mean of batch means would move with the evaluation batch size, and weigh a three-token answer like a long one.
    What `push_to_hub: true` publishes while it trains is what [`~sft_phi3v.hub.trained_files`] says, where transformers
    would upload the folder: pickled arguments with the token in them, and paths of this machine.
    """

    recipe: Recipe
    evaluation: Evaluation
    tracking: Tracking
    meter: Meter

    plan: Plan | None = None

    def watch(
        self, recipe: Recipe, evaluation: Evaluation, tracking: Tracking, shape: Shape, plan: Plan | None = None
    ) -> None:
        """
        Takes our trackers in the place of transformers', the rows to answer at each evaluation, the largest batch that
        there can be, and the plan of the batches if there is one.
        """
        self.recipe, self.evaluation, self.tracking, self.meter = recipe, evaluation, tracking, Meter()
        self.shape, self.plan = shape, plan
        self._rows: list[list[Any]] = []  # names of the rows in the step's batches,
        self._losses: list[torch.Tensor] = []  # and the losses on them
        self._skipped = 0  # steps in a row that `nonfinite: skip` has left out
        self._aside: Path | None = None  # where the checkpoint lies that is being written
        self._due = False  # whether the step that is saved should have been evaluated first
        self._last_of_epoch = -1  # the step after which an epoch was last seen to end
        for kind in get_reporting_integration_callbacks(self.args.report_to):
            self.remove_callback(kind)
        if isinstance(recipe.task.checkpointed_layers, int):
            self.add_callback(Checkpointing(recipe.task.checkpointed_layers))
        self.add_callback(self.meter)
        self.add_callback(tracking)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As transformers', from a whole checkpoint on; raises [`~sft_phi3v.interruption.Interrupted`] when stopped."""
        self._resumed = Path(str(resume_from_checkpoint)) if resume_from_checkpoint else None
        if self._resumed is not None and (self._resumed / DUE).is_file():
            self.args.eval_on_start = True
        with INTERRUPTION.awaited():
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        if INTERRUPTION.agreed():
            raise Interrupted
        return output

    def get_train_dataloader(self) -> DataLoader[Any]:
        return _undisturbed(super().get_train_dataloader() if self.plan is None else self._planned(self.plan))

    def _planned(self, plan: Plan) -> DataLoader[Any]:
        """As transformers', with the planned batches of this process."""
        args, process = self.args, self.accelerator.process_index
        seed = args.seed if args.data_seed is None else args.data_seed
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=Planned(plan, seed=seed, process=process),
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            in_order=args.dataloader_in_order,
            worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=process),
        )
        # Not `accelerator.prepare`: what it wraps around the sampler hides `set_epoch` from a run that is resumed.
        return prepare_data_loader(
            loader,
            self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=self.accelerator.device_placement,
            rng_types=self.accelerator.rng_types.copy(),
            non_blocking=self.accelerator.non_blocking,
        )

    def get_total_train_batch_size(self, args: Any) -> int:
        if self.plan is None:
            return int(super().get_total_train_batch_size(args))
        return round(args.gradient_accumulation_steps * self.plan.rows / self.plan.steps)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        return _undisturbed(super().get_eval_dataloader(*args, **kwargs))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run that was cut after its last step: transformers would look at max_steps only after one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _load_best_model(self) -> None:
        if problem := damage(Path(str(self.state.best_model_checkpoint))):
            best = self.state.best_model_checkpoint
            print(f"load_best_model_at_end: {best} is damaged ({problem}): the last weights are kept", flush=True)
            return
        super()._load_best_model()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        start = time.perf_counter()
        batches, items = super().get_batch_samples(*args, **kwargs)
        self.meter.fetched(batches, start)
        return batches, items

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        self._rows, self._losses = [batch.pop("rows", []) for batch in batch_samples], []
        if self.plan is not None:
            last = self.accelerator.gradient_state.end_of_dataloader
            if last and self.accelerator.process_index >= self.plan.processes - self.plan.missing:
                batch_samples[-1]["labels"][:] = IGNORED
            return super()._get_num_items_in_batch(batch_samples, device)
        # Where the rows of an epoch do not divide, Accelerate fills up its last batches with the first rows again: one
        # process alone would not learn from these.
        size, processes = self._train_batch_size, self.accelerator.num_processes
        real = 0 if isinstance(self.train_dataset, Stream) else len(self.train_dataset) % (size * processes)
        filled = real and processes > 1 and not self.args.dataloader_drop_last
        if filled and self.accelerator.gradient_state.end_of_dataloader:
            repeated = row_numbers(batch_samples[-1]) >= real - size * self.accelerator.process_index
            batch_samples[-1]["labels"].masked_fill_(repeated, IGNORED)
        return super()._get_num_items_in_batch(batch_samples, device)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._losses.append(loss)
        return loss if self.recipe.task.nonfinite == "error" else loss.nan_to_num(0.0, 0.0, 0.0)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        # TRL reads the head's weight and does not call the head, for which FSDP would gather it: in a full fine-tuning
        # each process would then train its shard of the head on its own rows alone.
        head = self.model.get_output_embeddings()
        if isinstance(head, FSDPModule) and torch.is_grad_enabled():
            head.unshard()
        if self.label_smoother is None:  # which wants the logits of all positions
            inputs = only_supervised(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def out_of_memory(self, error: RuntimeError) -> str:
        """What helps most, where memory was not enough."""
        processes, device = self.accelerator.num_processes, self.args.device
        memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
        try:
            return oom_message(self.recipe, self.model.config, self.shape, memory, processes=processes)
        except ValueError as unknown:
            return f"{first_line(error)} What helps cannot be estimated: {unknown}"

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        scaled = self.accelerator.scaler is not None
        if not scaled and math.isfinite(norm):
            self._skipped = 0
            return norm
        broken = (~torch.stack(self._losses).isfinite()).tolist()
        rows = [row for batch, bad in zip(self._rows, broken, strict=True) if bad for row in batch]
        in_loss = gather_object(rows) if self.accelerator.num_processes > 1 else rows
        if scaled and not in_loss:
            self._skipped = 0
            return norm  # float16 overflows now and then: its scaler leaves the step out, and scales less
        rows = [row for batch in self._rows for row in batch]
        rows = in_loss or (gather_object(rows) if self.accelerator.num_processes > 1 else rows)
        self._not_finite(model, sorted(set(map(str, rows))), "loss" if in_loss else "gradient")
        return torch.zeros(())

    def _not_finite(self, model: Any, rows: list[str], what: str) -> None:
        """Leaves a step out, or stops with what was learned before it: all processes come here together."""
        step, folder = self.state.global_step, Path(str(self.args.output_dir))
        gradients = [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.requires_grad]
        local = [(name, getattr(grad, "_local_tensor", grad)) for name, grad in gradients]  # FSDP's shards
        broken = [name for name, grad in local if grad is not None and not grad.isfinite().all()]
        if self.is_world_process_zero():
            report = {"step": step + 1, "not_finite": what, "rows": rows, "gradients": broken}
            write_whole(folder / "nonfinite.json", json.dumps(report, indent=1) + "\n")
        shown = f"{', '.join(rows[:SHOWN])}{' …' if len(rows) > SHOWN else ''}"
        said = f"step {step + 1}: the {what} is not a finite number, with rows {shown}"
        self._skipped += 1
        if self.accelerator.scaler is None:
            model.zero_grad()
        if self.recipe.task.nonfinite == "skip" and self._skipped <= MOST_SKIPPED:
            if self.is_world_process_zero():
                print(f"nonfinite: {said}; it is left out", flush=True)
            return
        model.zero_grad()
        saved = folder / f"checkpoint-{step}"
        if step and not saved.is_dir():
            self._save_checkpoint(model)
        before = f"What was learned before is in {saved}. " if step else ""
        again = f" {MOST_SKIPPED} steps before it were left out for the same." if self._skipped > MOST_SKIPPED else ""
        raise Halted(
            f"{said}.{again} {before}{folder / 'nonfinite.json'} names all rows, and where in the model it shows. Look "
            "at these rows; lower `learning_rate` or `max_grad_norm`; or leave such steps out: --nonfinite skip"
            if self.is_world_process_zero()
            else ""
        )

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        step, epoch = self.state.global_step, float(self.state.epoch or 0)
        # After an epoch's last step this is called twice, the second time for what is due once an epoch.
        ending = epoch == int(epoch) and self._last_of_epoch != step
        self._last_of_epoch = step
        self._due, stopping = False, not ending and INTERRUPTION.agreed()
        if stopping:
            self._due = self.control.should_evaluate
            self.control.should_log, self.control.should_evaluate, self.control.should_save = True, False, True
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except Interrupted:
            self._due = stopping = True
            self._save_checkpoint(model, trial)
        if stopping:
            raise Interrupted

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs | self.meter.take() if "loss" in logs else logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):  # with or without evaluation, a run trains to the same weights
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
            if self.recipe.task.generation_rows:
                scores, completions = self.evaluation.sampled(self.model)
                self.log({**scores})
                self.show("while it trains", completions)
                metrics |= scores
        return metrics

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        metrics: dict[str, float] = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        # The evaluation that a stopped run owed: its checkpoint may be the best one.
        if skip_scheduler and self._resumed is not None and self._determine_best_metric(metrics, trial):
            self.state.best_model_checkpoint = str(self._resumed)
        return metrics

    def show(self, label: str, completions: Sequence[Completion]) -> None:
        """Shows trackers the sample's pictures, with what a model made of these or of all rows."""
        if self.is_world_process_zero():
            if len(completions) > len(self.evaluation.sample):
                completions = [completions[index] for index in self.evaluation.sample]
            self.tracking.show(self.evaluation, completions, label, self.state.global_step)

    def log_trained(self, folder: Path, when: str, alias: str) -> None:
        """Shows trackers what was trained, the files that others may have of it."""
        if self.is_world_process_zero():
            kind = "adapter" if isinstance(self.model, PeftModel) else "model"
            self.tracking.log_model(kind, lambda: trained_files(self.recipe, folder), when, alias)

    def checkpoint_size(self) -> int:
        """Bytes of a checkpoint, at most: what is trained, AdamW's two moments of it, and what FSDP saves once more."""
        trained = [parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad]
        return 4 * (MOMENTS + self.is_fsdp_enabled) * sum(trained)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        folder = Path(str(self.args.output_dir))
        target = folder / f"checkpoint-{self.state.global_step}"
        with self._written_aside(target) as aside:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            written = aside / target.name
            if self.state.best_model_checkpoint == str(written):
                self.state.best_model_checkpoint = str(target)
            if self.is_world_process_zero():
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))
                for name in (RUN_IDS, "recipe.yaml", "environment.json"):
                    if (folder / name).is_file():
                        shutil.copy(folder / name, written)
                if self._due:
                    (written / DUE).touch()
                finish(written, target)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))
        if self.is_world_process_zero():
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(str(folder), limit, best, use_mtime=True)
        self.log_trained(target, "checkpoint", f"step-{self.state.global_step}")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if output_dir is not None:
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(str(self.args.output_dir))
        with self._written_aside(folder) as aside:
            super().save_model(str(aside), _internal_call=True)
            if self.is_world_process_zero():
                # What says that there is a model comes last.
                for path in sorted(
                    aside.iterdir(), key=lambda path: path.name in ("adapter_config.json", "config.json")
                ):
                    os.replace(path, folder / path.name)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub("Model save")

    @contextlib.contextmanager
    def _written_aside(self, target: Path) -> Iterator[Path]:
        """A folder to write into; older checkpoints are not touched before all of it is written."""
        folder = Path(str(self.args.output_dir))
        self._aside = folder / ASIDE
        try:
            if self.is_world_process_zero():
                shutil.rmtree(self._aside, ignore_errors=True)
                check_room(folder, self.checkpoint_size(), target.name)
                self._aside.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            yield self._aside
        except Exception as error:
            if self.is_world_process_zero():
                shutil.rmtree(folder / ASIDE, ignore_errors=True)
            if isinstance(error, ValueError):  # there was no room for it
                raise Halted(str(error)) from error
            left = next((str(path) for path in checkpoints(folder)), "none")
            raise Halted(
                f"{target} could not be written: {type(error).__name__}: {first_line(error)}\nThe last whole "
                f"checkpoint is {left}. Make room, or put right what is wrong; the same command then goes on from it."
            ) from error
        finally:
            self._aside = None
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            shutil.rmtree(folder / ASIDE, ignore_errors=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        if self.is_world_process_zero():
            try:
                write_whole(Path(str(self.args.output_dir), "README.md"), self._card())
            except Exception as error:  # whatever is odd about the data, a card is not worth a run
                print(f"model card: not written: {error}", flush=True)

    def _card(self) -> str:
        repo = self.hub_model_id if self.args.push_to_hub else self.recipe.training.hub_model_id
        folder = Path(str(self.args.output_dir))
        return render_card(
            self.recipe, folder, repo=repo or folder.name, adapter_only=isinstance(self.model, PeftModel)
        )

    def push_to_hub(self, commit_message: str | None = "End of training", *args: Any, **kwargs: Any) -> None:
        self.save_model(_internal_call=True)
        if self.is_world_process_zero():
            self._finish_current_push()
            self._publish(Path(str(self.args.output_dir)), str(commit_message))
            self._finish_current_push()
            self._report_failed_push()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._aside is not None:  # it is published once it is whole
            return
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.push_in_progress is None or self.push_in_progress.is_done() or self.args.hub_always_push:
            self._report_failed_push()
            self._publish(Path(checkpoint_folder), f"Training in progress, step {self.state.global_step}")

    def _publish(self, folder: Path, message: str) -> None:
        """Begins to upload; training goes on meanwhile, and if the Hub will not have it."""
        try:
            files = trained_files(self.recipe, folder)
            files |= {"README.md": self._card().encode(), "recipe.yaml": public_recipe(self.recipe, folder).encode()}
            check_for_leaks(files, str(self.args.hub_token or ""))
        except Exception as error:
            print(f"hub: this was not published: {error}", flush=True)
            return
        job = HfApi(token=self.args.hub_token).create_commit(
            self.hub_model_id,
            [CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message=message,
            revision=self.args.hub_revision,
            run_as_future=True,
        )
        self.push_in_progress = PushInProgress([job])

    def _report_failed_push(self) -> None:
        """The Hub must not stop a run that is going well: what it refuses is said, and is tried again with the next."""
        for job in self.push_in_progress.jobs if self.push_in_progress is not None else ():
            if (error := job.exception()) is not None:
                print(f"hub: this was not published: {first_line(error)}", flush=True)
        self.push_in_progress = None

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        stream = dataloader.dataset  # it has the length of this process's share
        return stream.num_shards if isinstance(stream, Stream) else super().num_examples(dataloader)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self._sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        output = super().evaluation_loop(*args, **kwargs)
        loss, correct, tokens = self._sums.tolist()
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics[f"{prefix}_loss"] = loss / max(tokens, 1)
        output.metrics[f"{prefix}_mean_token_accuracy"] = correct / max(tokens, 1)
        return output

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        if INTERRUPTION.waiting and INTERRUPTION.agreed():
            raise Interrupted
        inputs.pop("rows", None)
        inputs = self._prepare_inputs(inputs)
        numbers, kept = row_numbers(inputs), only_supervised(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**kept, fused_lm_head=True)
        found = torch.cat([-outputs.log_probs, outputs.is_top1, outputs.label_mask]).double().T  # (kept, 3)
        rows = found.new_zeros(int(numbers.max()) + 1, 3)
        rows.index_add_(0, numbers.flatten()[kept["kept_positions"]], found)
        # gather_for_metrics drops the rows that were repeated to fill the last batch of all processes.
        self._sums += self.accelerator.gather_for_metrics(rows.contiguous()).sum(dim=0)
        return rows[:, 0].sum() / rows[:, 2].sum().clamp(min=1), None, None


def _undisturbed(loader: DataLoader[Any]) -> DataLoader[Any]:
    inner = getattr(loader, "base_dataloader", loader)  # Accelerate's only wraps the one that starts workers
    inner.worker_init_fn = partial(undisturbed, inner.worker_init_fn, INTERRUPTION.leaving)
    return loader
