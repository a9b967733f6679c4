"""One recipe, from rows to a scored adapter: the table of contents of this project.

accelerate launch sft_phi3v/run.py recipes/burberry.yaml [--key value …]
"""

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from sft_phi3v.data import to_examples
from sft_phi3v.evaluation import Evaluation, write_whole
from sft_phi3v.model import landing_table, load_model, lora_config
from sft_phi3v.prepare import prepare as prepare_data
from sft_phi3v.preview import prepare, print_once
from sft_phi3v.recipe import Recipe, check_machine, check_output_dir, differences, load_recipe
from sft_phi3v.streaming import Passing, Resume, Stream


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
    if recipe.prepare.prepare and recipe.prepare.source:
        with PartialState().main_process_first():
            if PartialState().is_main_process and not Path(str(recipe.script.dataset_name)).expanduser().exists():
                prepare_data(recipe)
    collator, train_rows, held_out_rows = prepare(recipe)
    if isinstance(train_rows, Stream) and recipe.resume:
        _check_shares(recipe)
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
    # TRL turns the adapter of a quantised model into bfloat16, but PEFT reads a checkpoint back as float32: a resumed
    # run would go on in another precision than the one that was cut. Small updates need float32 in any case.
    if isinstance(trainer.model, PeftModel):
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    print_once(f"{landing_table(trainer.model)}\n")
    if trainer.is_world_process_zero():
        recipe.save(str(recipe.training.output_dir))
        _save_environment(recipe)
    return trainer, Evaluation(recipe, collator.processor, train_rows, held_out_rows)


def train(recipe: Recipe, trainer: "Trainer", evaluation: Evaluation) -> None:
    """
    Scores, trains, and scores again, by free generation on held-out rows.

    Args:
        recipe ([`Recipe`]): The recipe.
        trainer ([`Trainer`]): From [`set_up`].
        evaluation ([`Evaluation`]): From [`set_up`]; its scores end in `output_dir`, beside adapter and processor.
    """
    if not (recipe.resume and evaluation.resume()):
        evaluation.run("before", trainer.model)
        evaluation.write()
    trainer.train(resume_from_checkpoint=recipe.resume)
    trainer.save_model()
    trainer.save_state()
    if isinstance(trainer.train_dataset, Stream) and trainer.train_dataset.fits:
        left_out = sum(gather_object([int(trainer.train_dataset.left_out.sum())]))
        limit = f"more than {recipe.training.max_length} tokens"
        print_once(f"overlong: {left_out} rows of the last epoch have {limit}: left out, others came twice instead.")
    evaluation.run("after", trainer.model)
    evaluation.run("after_shuffled", trainer.model, shuffled=True)
    evaluation.write()
    if recipe.training.report_to:
        trainer.log(_flat(evaluation.metrics))
    print_once(f"\n{evaluation.table()}\n\nadapter, scores and completions: {recipe.training.output_dir}")


class Trainer(SFTTrainer):
    """TRL's trainer, with an evaluation loss that is a mean over supervised tokens.

    A mean of batch means would move with the evaluation batch size, and weigh a three-token answer like a long one.
    """

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


def _save_environment(recipe: Recipe) -> None:
    """Writes what the run ran on; versions are what a later surprise is compared with first."""
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
    }
    folder = Path(str(recipe.training.output_dir))
    write_whole(folder / "environment.json", json.dumps(environment, indent=2) + "\n")


def _flat(metrics: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """`{"after": {"parsed": 1.0}}` → `{"after/parsed": 1.0}`, as trackers take it."""
    flat: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, dict):
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
