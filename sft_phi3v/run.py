"""One recipe, from rows to a scored adapter: the table of contents of this project.

accelerate launch sft_phi3v/run.py recipes/burberry.yaml [--key value …]
"""

from sft_phi3v.usage import check_recipe

if __name__ == "__main__":
    check_recipe()  # before torch is imported

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size
from peft import PeftModel

from sft_phi3v.checkpoints import check_room, check_shared, claimed, finished, resumed_from, write_whole
from sft_phi3v.data import to_examples
from sft_phi3v.evaluation import Evaluation, identity, of_scored, trained_hashes
from sft_phi3v.features import Examples, Part, cached
from sft_phi3v.fit import settle_layers
from sft_phi3v.hub import check_before_training
from sft_phi3v.interruption import EXIT_CODE, INTERRUPTION, Halted, Interrupted
from sft_phi3v.machine import check_kernels, check_machine, check_restarts, free_memory
from sft_phi3v.model import (
    base_commit,
    freeze_unused,
    kernels_line,
    landing_table,
    load_config,
    load_model,
    lora_config,
    on_device,
)
from sft_phi3v.phi3_v import Phi3VConfig
from sft_phi3v.preview import Prepared, largest_batch, prepare, print_once, steps
from sft_phi3v.recipe import Recipe, load_recipe, local_paths
from sft_phi3v.streaming import Passing, Resume, Stream
from sft_phi3v.tracking import Launch, Tracking
from sft_phi3v.trainer import Trainer


def set_up(recipe: Recipe, launch: Launch | None = None) -> tuple[Trainer, Evaluation, Path | None]:
    """
    Everything that can be wrong before training is found here, and what was set up is shown.

    Args:
        recipe ([`Recipe`]): The recipe.
        launch ([`Launch`], *optional*): Is told what passed, and says it after the first step.

    Returns:
        `tuple[Trainer, Evaluation, Path | None]`: TRL's trainer with the adapted model; the held-out rows to score it
        on; and the checkpoint to go on from, if there is one.

    Raises:
        ValueError: If the recipe, the machine, the data or the model is not right; says what to do about it.
    """
    launch = Launch() if launch is None else launch
    check_machine(recipe)
    check_kernels(recipe)
    check_shared(Path(str(recipe.training.output_dir)))
    checkpoint = resumed_from(recipe)
    if checkpoint is not None:
        print_once(f"resume: going on from {checkpoint}")
    tracking = Tracking(recipe, checkpoint)
    if recipe.prepare.prepare and recipe.prepare.source:
        _prepare_once(recipe)
        launch.passed("preparing")
    prepared = prepare(recipe)
    collator, train_rows, held_out_rows = prepared.collator, prepared.train, prepared.held_out
    evaluation = Evaluation(recipe, collator.processor, train_rows, held_out_rows)
    _check_best_metric(recipe, evaluation)
    shape = largest_batch(recipe, prepared)
    if recipe.task.checkpointed_layers == "auto":
        processes = PartialState().num_processes
        recipe, chosen = settle_layers(recipe, load_config(recipe), shape, free_memory(), processes=processes)
        print_once(f"{chosen}\n")
    launch.passed("data")
    model = load_model(recipe, kernels=recipe.task.use_kernels)
    freeze_unused(model)
    launch.passed("model")
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
    trainer.watch(recipe, evaluation, tracking, shape, prepared.plan)
    trainer.meter.launch = launch
    if recipe.training.save_strategy != "no":
        check_room(evaluation.folder, trainer.checkpoint_size(), "a checkpoint")
    if recipe.training.push_to_hub and trainer.is_world_process_zero():
        check_before_training(recipe, trainer.hub_model_id)
    # TRL turns the adapter of a quantised model into bfloat16, but PEFT reads a checkpoint back as float32: a resumed
    # run would go on in another precision than the one that was cut. Small updates need float32 in any case.
    if isinstance(trainer.model, PeftModel):
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    print_once(f"{landing_table(trainer.model)}\n")
    if recipe.task.use_kernels:
        print_once(f"{kernels_line(trainer.model)}\n")
    if recipe.task.feature_cache is not None:
        _use_features(recipe, trainer, evaluation, prepared)
    if trainer.is_world_process_zero():
        recipe.save(str(recipe.training.output_dir))
        tracking.environment = _save_environment(recipe, trainer.model.config, len(train_rows), len(held_out_rows))
        overview = of_scored(prepared.overview, evaluation.rows)
        write_whole(evaluation.folder / "data.json", json.dumps(overview, indent=2) + "\n")
    launch.passed("trainer")
    return trainer, evaluation, checkpoint


def train(recipe: Recipe, trainer: Trainer, evaluation: Evaluation, checkpoint: Path | None = None) -> None:
    """
    Scores, trains, and scores again, by free generation on held-out rows.

    Args:
        recipe ([`Recipe`]): The recipe.
        trainer ([`Trainer`]): From [`set_up`].
        evaluation ([`Evaluation`]): From [`set_up`]; its scores end in `output_dir`, beside adapter and processor.
        checkpoint (`Path`, *optional*): From [`set_up`].

    Raises:
        Interrupted: If the run was asked to stop; a checkpoint holds all that it did.
        Halted: If it cannot go on.
    """
    base = str(recipe.model.model_name_or_path)
    if not evaluation.resume():
        # FSDP leaves a model where it is until it trains.
        evaluation.run("before", on_device(trainer.model), weights=identity(base, trainer.model))
        evaluation.write()
        trainer.show("before", evaluation.completions["before"])
        if trainer.meter.launch is not None:
            trainer.meter.launch.passed("scores before training")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
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
    if trainer.is_world_process_zero():
        finished(evaluation.folder)
    print_once(f"\n{evaluation.table()}\n\n{found}\n\nadapter, scores and completions: {recipe.training.output_dir}")


def _use_features(recipe: Recipe, trainer: Trainer, evaluation: Evaluation, prepared: Prepared) -> None:
    """Has the trainer read image features in place of pictures; scoring goes on with pixels."""
    parts = [Part(prepared.train, prepared.pictures), Part(prepared.held_out, prepared.held_out_pictures)]
    epoch, total = steps(len(prepared.train), recipe, prepared.plan)
    features = cached(
        recipe,
        on_device(trainer.model).get_base_model(),
        prepared.collator.processor,
        parts,
        precision=evaluation.precision(trainer.model),
        epochs=total / epoch,
        say=print_once,
    )
    trainer.train_dataset, trainer.eval_dataset = (Examples(part, recipe) for part in parts)
    trainer.data_collator = Passing(replace(prepared.collator, features=features))


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


def _prepare_once(recipe: Recipe) -> None:
    """The main process prepares the data set; the others look for it, which no time-out of their group ends."""
    from sft_phi3v.prepare import prepare as prepare_data  # and all that fetches, which few runs need

    folder = Path(str(recipe.script.dataset_name)).expanduser()
    if PartialState().is_main_process and not folder.exists():
        prepare_data(recipe)
    while not folder.exists():
        time.sleep(1)


def main(argv: list[str] | None = None) -> None:
    """`python -m sft_phi3v.run RECIPE [--key value …]`"""
    launch = Launch()
    launch.passed("imports")
    try:
        check_restarts()
    except ValueError as error:  # of each machine, which may have been started in another way
        raise SystemExit(f"error: {error}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1) from None
    with contextlib.ExitStack() as stack:
        stack.enter_context(INTERRUPTION.heeded())
        try:
            recipe = load_recipe(sys.argv[1:] if argv is None else argv)
            launch.passed("recipe")
            stack.enter_context(claimed(Path(str(recipe.training.output_dir))))
            trainer, evaluation, checkpoint = set_up(recipe, launch)
        except ValueError as error:  # what a person can put right needs no traceback, and needs saying once
            raise SystemExit(f"error: {error}" if PartialState().is_main_process else 1) from None
        try:
            train(recipe, trainer, evaluation, checkpoint)
        except Interrupted:
            trainer.tracking.finish()
            step, most = trainer.state.global_step, trainer.state.max_steps
            saved = f"stopped after step {step} of {most}, which is saved: the same command goes on from there."
            print_once(saved if step else "stopped before the first step: the same command starts again.")
            raise SystemExit(EXIT_CODE) from None
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            trainer.tracking.finish()
            raise SystemExit(f"error: {trainer.out_of_memory(error)}") from error
        except Halted as error:
            trainer.tracking.finish()
            raise SystemExit(f"error: {error}" if str(error) else 1) from error


if __name__ == "__main__":
    main()
