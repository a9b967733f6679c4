"""One recipe, from rows to a scored adapter: the table of contents of this project.

accelerate launch sft_phi3v/run.py recipes/burberry.yaml [--key value …]
"""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from huggingface_hub import CommitOperationAdd, HfApi
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_utils import EvalLoopOutput, HubStrategy
from transformers.utils import PushInProgress
from trl import SFTTrainer

from sft_phi3v.card import render_card
from sft_phi3v.data import to_examples
from sft_phi3v.evaluation import Evaluation, identity, of_scored, public_recipe, trained_hashes, write_whole
from sft_phi3v.hub import check_before_training, check_for_leaks, trained_files
from sft_phi3v.model import base_commit, first_line, landing_table, load_model, lora_config
from sft_phi3v.phi3_v import Phi3VConfig
from sft_phi3v.prepare import prepare as prepare_data
from sft_phi3v.preview import prepare, print_once
from sft_phi3v.recipe import Recipe, check_machine, check_output_dir, differences, load_recipe, local_paths
from sft_phi3v.scoring import Completion
from sft_phi3v.streaming import Passing, Resume, Stream
from sft_phi3v.tracking import Meter, Tracking


def set_up(recipe: Recipe) -> tuple["Trainer", Evaluation]:
    """
    Everything that can be wrong before training is found here, and what was set up is shown.

    Args:
        recipe ([`Recipe`]): The recipe.

    Returns:
        `tuple[Trainer, Evaluation]`: TRL's trainer with the adapted model, and the held-out rows to score it on.

    Raises:
        ValueError: If the recipe, the machine, the data or the model is not right; says what to do about it.
    """
    check_machine(recipe)
    check_output_dir(recipe)
    tracking = Tracking(recipe)
    if recipe.prepare.prepare and recipe.prepare.source:
        with PartialState().main_process_first():
            if PartialState().is_main_process and not Path(str(recipe.script.dataset_name)).expanduser().exists():
                prepare_data(recipe)
    prepared = prepare(recipe)
    collator, train_rows, held_out_rows = prepared.collator, prepared.train, prepared.held_out
    if isinstance(train_rows, Stream) and recipe.resume:
        _check_shares(recipe)
    evaluation = Evaluation(recipe, collator.processor, train_rows, held_out_rows)
    _check_best_metric(recipe, evaluation)
    model = load_model(recipe)
    trainer = Trainer(
        model=model,
        args=recipe.training,
        train_dataset=train_rows if isinstance(train_rows, Stream) else to_examples(train_rows, recipe),
        eval_dataset=to_examples(held_out_rows, recipe),
        data_collator=Passing(collator),
        processing_class=collator.processor,
        peft_config=lora_config(recipe, model),
        callbacks=[Resume()],
    )
    trainer.watch(recipe, evaluation, tracking)
    if recipe.training.push_to_hub and trainer.is_world_process_zero():
        check_before_training(recipe, trainer.hub_model_id)
    # TRL turns the adapter of a quantised model into bfloat16, but PEFT reads a checkpoint back as float32: a resumed
    # run would go on in another precision than the one that was cut. Small updates need float32 in any case.
    if isinstance(trainer.model, PeftModel):
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    print_once(f"{landing_table(trainer.model)}\n")
    if trainer.is_world_process_zero():
        recipe.save(str(recipe.training.output_dir))
        tracking.environment = _save_environment(recipe, trainer.model.config, len(train_rows), len(held_out_rows))
        overview = of_scored(prepared.overview, evaluation.rows)
        write_whole(evaluation.folder / "data.json", json.dumps(overview, indent=2) + "\n")
    return trainer, evaluation


def train(recipe: Recipe, trainer: "Trainer", evaluation: Evaluation) -> None:
    """
    Scores, trains, and scores again, by free generation on held-out rows.

    Args:
        recipe ([`Recipe`]): The recipe.
        trainer ([`Trainer`]): From [`set_up`].
        evaluation ([`Evaluation`]): From [`set_up`]; its scores end in `output_dir`, beside adapter and processor.
    """
    base = str(recipe.model.model_name_or_path)
    if not (recipe.resume and evaluation.resume()):
        evaluation.run("before", trainer.model, weights=identity(base, trainer.model))
        evaluation.write()
        trainer.show("before", evaluation.completions["before"])
    trainer.train(resume_from_checkpoint=recipe.resume)
    trainer.save_model()
    trainer.save_state()
    if isinstance(trainer.train_dataset, Stream) and trainer.train_dataset.fits:
        left_out = sum(gather_object([int(trainer.train_dataset.left_out.sum())]))
        limit = f"more than {recipe.training.max_length} tokens"
        print_once(f"overlong: {left_out} rows of the last epoch have {limit}: left out, others came twice instead.")
    weights = trained_hashes(evaluation.folder)
    for name in ("after", "after_shuffled", "after_blank"):
        evaluation.run(name, trainer.model, weights=weights)
    found = evaluation.compare()
    evaluation.write()
    evaluation.save_examples()
    trainer.show("after", evaluation.completions["after"])
    # Not by `trainer.log`, which would print some hundred numbers: the table says them.
    trainer.tracking.on_log(trainer.args, trainer.state, trainer.control, logs=_flat(evaluation.metrics))
    trainer.create_model_card()
    alias = "best" if recipe.training.load_best_model_at_end else "last"
    trainer.log_trained(evaluation.folder, "end", alias)
    trainer.tracking.finish()
    if recipe.training.push_to_hub:
        trainer.push_to_hub("With scores")
    print_once(f"\n{evaluation.table()}\n\n{found}\n\nadapter, scores and completions: {recipe.training.output_dir}")


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

    def watch(self, recipe: Recipe, evaluation: Evaluation, tracking: Tracking) -> None:
        """Takes our trackers in the place of transformers', and the rows to answer at each evaluation."""
        self.recipe, self.evaluation, self.tracking, self.meter = recipe, evaluation, tracking, Meter()
        for kind in get_reporting_integration_callbacks(self.args.report_to):
            self.remove_callback(kind)
        self.add_callback(self.meter)
        self.add_callback(tracking)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        start = time.perf_counter()
        batches, items = super().get_batch_samples(*args, **kwargs)
        self.meter.fetched(batches, start)
        return batches, items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs | self.meter.take() if "loss" in logs else logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        if self.recipe.task.generation_rows:
            scores, completions = self.evaluation.sampled(self.model)
            self.log({**scores})
            self.show("while it trains", completions)
            metrics |= scores
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

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        step = self.state.global_step
        self.log_trained(Path(str(self.args.output_dir), f"checkpoint-{step}"), "checkpoint", f"step-{step}")

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
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, fused_lm_head=True)
        rows = torch.stack([-outputs.log_probs, outputs.is_top1, outputs.label_mask]).double().sum(dim=2).T  # (rows, 3)
        # gather_for_metrics drops the rows that were repeated to fill the last batch of all processes.
        self._sums += self.accelerator.gather_for_metrics(rows.contiguous()).sum(dim=0)
        return rows[:, 0].sum() / rows[:, 2].sum().clamp(min=1), None, None


def _check_best_metric(recipe: Recipe, evaluation: Evaluation) -> None:
    """Refuses a `metric_for_best_model` that no evaluation will give, or that would choose the worst."""
    given = recipe.training.metric_for_best_model
    if given is None:
        return
    name = given if given.startswith("eval_") else f"eval_{given}"
    greater = recipe.training.greater_is_better
    if greater == (name == "eval_loss"):
        raise ValueError(f"`metric_for_best_model: {given}` with `greater_is_better: {greater}` would keep the worst.")
    if name in ("eval_loss", "eval_mean_token_accuracy"):
        return
    names = evaluation.sampled_scores() if recipe.task.generation_rows else []
    if name not in names:
        raise ValueError(
            f"`metric_for_best_model` is {given!r}, expected one of eval_loss, eval_mean_token_accuracy"
            + (f", {', '.join(names)}." if names else "; with `generation_rows` above 0 also scores of generation.")
        )


def _check_shares(recipe: Recipe) -> None:
    """Refuses to go on with a stream that would be shared out in another way: rows would come twice, or not at all."""
    folder = Path(recipe.resume).parent if isinstance(recipe.resume, str) else Path(str(recipe.training.output_dir))
    changed = {"dataloader_num_workers", "per_device_train_batch_size"} & {*differences(folder / "recipe.yaml", recipe)}
    environment, processes = folder / "environment.json", PartialState().num_processes
    if environment.is_file() and json.loads(environment.read_text(encoding="utf-8"))["processes"] != processes:
        changed.add("the number of processes")
    if changed:
        raise ValueError(
            f"`resume_from_checkpoint` with `dataset_streaming`: rows are shared out by {', '.join(sorted(changed))}, "
            "which changed. Put this back as it was, or start a new run in a fresh folder (--output_dir ...)."
        )


def _save_environment(recipe: Recipe, config: Phi3VConfig, train: int, held_out: int) -> dict[str, Any]:
    """Writes and returns what the run ran on; versions are what a later surprise is compared with first."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    ).stdout.strip()
    packages = (
        "torch",
        "transformers",
        "trl",
        "peft",
        "accelerate",
        "datasets",
        "bitsandbytes",
        "pillow",
        "sft_phi3v",
    )
    environment = {
        "python": platform.python_version(),
        "packages": {package: version(package) for package in packages},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "processes": PartialState().num_processes,
        "rows": {"train": train, "held_out": held_out},
        "base_revision": base_commit(config),
        "commit": commit or None,
        "local_paths": local_paths(recipe.dump()),
    }
    folder = Path(str(recipe.training.output_dir))
    write_whole(folder / "environment.json", json.dumps(environment, indent=2) + "\n")
    return environment


def _flat(metrics: dict[str, Any], prefix: str = "eval_") -> dict[str, float]:
    """`{"after": {"parsed": 1.0}}` → `{"eval_after/parsed": 1.0}`; trackers show it as eval/after/parsed."""
    flat: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, dict) and key not in ("confusion", "errors"):
            flat |= _flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            flat[f"{prefix}{key}"] = value
    return flat


def main(argv: list[str] | None = None) -> None:
    """`python -m sft_phi3v.run RECIPE [--key value …]`"""
    try:
        recipe = load_recipe(sys.argv[1:] if argv is None else argv)
        trainer, evaluation = set_up(recipe)
    except ValueError as error:  # what a person can put right needs no traceback, and needs saying once
        raise SystemExit(f"error: {error}" if PartialState().is_main_process else 1) from None
    train(recipe, trainer, evaluation)


if __name__ == "__main__":
    main()
