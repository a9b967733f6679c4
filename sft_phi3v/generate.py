"""Using what was trained: pictures in, answers out.

python -m sft_phi3v.generate --model outputs/tiny picture.jpg              # one: it answers as it writes
python -m sft_phi3v.generate --model me/my-model pictures/ --output answers.jsonl

`--model` is an adapter's folder, a merged folder, a base model, or any of these on the Hub. The recipe that lies in it
says what to ask, and reads the answer's fields back.
"""

from sft_phi3v.usage import generate_options

if __name__ == "__main__":
    generate_options()  # before torch is imported

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from peft import PeftModel
from PIL import Image
from tqdm import tqdm
from transformers import TextStreamer

from sft_phi3v.data import Template, conversation, open_picture
from sft_phi3v.evaluation import generate, with_pictures
from sft_phi3v.model import find_model, load_model, model_file, on_device
from sft_phi3v.phi3_v import Phi3VForCausalLM, Phi3VProcessor
from sft_phi3v.recipe import Parser, Recipe, TaskArguments, load_recipe
from sft_phi3v.scoring import Completion

RESULTS = {"text", "stopped", "fields", "error"}  # what an answer adds to a line
CHUNK = 4  # batches of pictures that are in memory at once, sorted among each other by length
ON_CPU = ["--use_cpu", "true", "--bf16", "false", "--fp16", "false", "--dtype", "float32"]


@dataclass(frozen=True)
class Loaded:
    """
    A model that is ready to answer.

    Args:
        model ([`Phi3VForCausalLM`] or `PeftModel`): On its device.
        processor ([`Phi3VProcessor`]): Its processor.
        task ([`TaskArguments`]): What the recipe beside it says to ask, and how to read the answer; else the defaults.
    """

    model: Phi3VForCausalLM | PeftModel
    processor: Phi3VProcessor
    task: TaskArguments


def load(name: str, *, base_model: str | None = None, num_crops: int | None = None) -> Loaded:
    """
    Loads anything that answers.

    Args:
        name (`str`): Folder or Hub id of an adapter, a merged model or a base model.
        base_model (`str`, *optional*): Where an adapter's base model lies, if not where the adapter says.
        num_crops (`int`, *optional*): Most crops per picture, if not as in training.

    Returns:
        [`Loaded`]: The model, its processor and its recipe's task.

    Raises:
        ValueError: If there is no such model, or an adapter's recipe or base model is missing.
    """
    adapter = find_model(name, key="--model")
    recipe_file = model_file(name, "recipe.yaml", key="--model")
    processor = Phi3VProcessor.from_pretrained(name, num_crops=num_crops)
    model: Phi3VForCausalLM | PeftModel
    if adapter is not None:
        model, recipe = _adapted(name, adapter, recipe_file, base_model)
        return Loaded(model.eval(), processor, recipe.task)
    dtype = torch.bfloat16 if torch.accelerator.is_available() else torch.float32
    model = on_device(Phi3VForCausalLM.from_pretrained(name, dtype=dtype)).eval()
    try:
        task = _recipe(recipe_file).task if recipe_file is not None else TaskArguments()
    except ValueError as error:  # a model that is whole can be asked without
        print(f"recipe.yaml of {name} is left aside: {error}", file=sys.stderr)
        task = TaskArguments()
    return Loaded(model, processor, task)


def _adapted(name: str, adapter: Path, recipe_file: Path | None, base_model: str | None) -> tuple[PeftModel, Recipe]:
    """An adapter on the base model that it records, quantised as the recipe beside it says."""
    if recipe_file is None:
        raise ValueError(
            f"--model: {name!r} is an adapter without recipe.yaml, so nothing says how its base model was quantised. "
            "Put the recipe of its training there."
        )
    record = json.loads(adapter.read_text(encoding="utf-8"))
    base = base_model or record["base_model_name_or_path"]
    recipe = _recipe(recipe_file, "--model_name_or_path", base)
    try:
        model = on_device(load_model(recipe, revision=None if base_model else record["revision"]))
    except ValueError as error:
        raise ValueError(f"{error} Where an adapter's base model has moved, say where it lies: --base_model") from error
    return PeftModel.from_pretrained(model, name), recipe


def _recipe(path: Path, *overrides: str) -> Recipe:
    """A recipe that lies beside a model, for this machine. Anybody may have written it: it sets no environment."""
    on_cpu = [] if torch.accelerator.is_available() else ON_CPU
    return load_recipe([str(path), *on_cpu, *overrides], set_environment=False)


@dataclass(frozen=True)
class Prompt:
    """
    What is asked.

    Args:
        source (`dict`): The line that it came from, or `{"image": path}`; kept in the answer.
        images (`list[Path]`): Its pictures.
        messages (`list[dict]`): The conversation so far, in TRL's format.
    """

    source: dict[str, Any]
    images: list[Path]
    messages: list[dict[str, Any]]


def prompts(inputs: Sequence[str], question: str) -> Iterator[Prompt]:
    """
    Args:
        inputs (sequence of `str`): Picture files, folders of pictures, and JSONL files. A line of JSONL has `image` or
            `images` (paths, counted from the file's folder), and `prompt` or `messages`.
        question (`str`): What to ask where a line does not say; a format string over the line's columns.

    Yields:
        [`Prompt`]: In the order of the inputs; the files of a folder by name.

    Raises:
        ValueError: If a folder holds no picture, or a line cannot be read.
    """
    known = set(Image.registered_extensions())
    template = Template(question, key="prompt")
    for given in inputs:
        path = Path(given).expanduser()
        if path.suffix.lower() in (".jsonl", ".json"):
            yield from _lines(path, template)
            continue
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in known)
            if not files:
                raise ValueError(f"{given}: this folder holds no pictures.")
        if template.fields:
            columns = ", ".join(f"{{{name}}}" for name in template.fields)
            raise ValueError(
                f"The recipe's `prompt` reads {columns}: give a .jsonl file with these columns, or --prompt."
            )
        for file in files:
            yield _asked({"image": str(file)}, [{"role": "user", "content": template.render({})}], [file])


def _lines(path: Path, template: Template) -> Iterator[Prompt]:
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    if not any(text.strip() for text in lines):
        raise ValueError(f"{path}: this file is empty.")
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            if taken := RESULTS & line.keys():
                raise ValueError(f"the key {min(taken)!r} is one of the answer's. Rename it")
            given = line.get("images", line.get("image", []))
            images = [path.parent / one for one in ([given] if isinstance(given, str) else given)]
            turns = line.get("messages")
            if turns is None:
                turns = [
                    {"role": "user", "content": str(line["prompt"]) if "prompt" in line else template.render(line)}
                ]
            yield _asked(line, turns, images)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path}, line {number}: {error}. Expected an object with `image` or `images`, and `prompt` or "
                "`messages`."
            ) from error


def _asked(source: dict[str, Any], turns: list[dict[str, Any]], images: list[Path]) -> Prompt:
    messages = conversation(turns, len(images))
    if not messages or messages[-1]["role"] == "assistant":
        raise ValueError("the last turn is not the user's: there is nothing to answer")
    return Prompt(source, images, messages)


def answers(
    loaded: Loaded, asked: Sequence[Prompt], *, max_new_tokens: int, batch_size: int, progress: bool = True
) -> Iterator[dict[str, Any]]:
    """
    Args:
        loaded ([`Loaded`]): The model.
        asked (sequence of [`Prompt`]): What is asked.
        max_new_tokens (`int`): Longest answer, in tokens.
        batch_size (`int`): Prompts answered at once.
        progress (`bool`, *optional*): Whether to show a bar.

    Yields:
        `dict`: In order: the prompt's `source` with `text`, `stopped` and, where the recipe has an `answer`, `fields`
        (`None` if the text has another form); or with `error`, if a picture cannot be read.
    """
    template = Template(loaded.task.answer) if loaded.task.answer is not None else None
    with tqdm(total=len(asked), desc="generate", disable=not progress) as bar:
        for start in range(0, len(asked), CHUNK * batch_size):
            chunk = asked[start : start + CHUNK * batch_size]
            examples, errors = [], dict[int, str]()
            for index, prompt in enumerate(chunk):
                try:
                    images = _pictures(loaded, prompt)
                    messages = [*prompt.messages, {"role": "assistant", "content": [{"type": "text", "text": ""}]}]
                    examples.append({"images": images, "messages": messages, "row": index})
                except ValueError as error:
                    errors[index] = str(error)
            completions = generate(
                loaded.model,
                loaded.processor,
                examples,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                progress=False,
            )
            found = {completion.row: completion for completion in completions}
            for index, prompt in enumerate(chunk):
                yield prompt.source | ({"error": errors[index]} if index in errors else _answer(found[index], template))
            bar.update(len(chunk))


def _answer(completion: Completion, template: Template | None) -> dict[str, Any]:
    answer: dict[str, Any] = {"text": completion.text, "stopped": completion.stopped}
    return answer | ({"fields": template.parse(completion.text)} if template is not None else {})


def _pictures(loaded: Loaded, prompt: Prompt) -> list[Image.Image]:
    """The pictures as training sees them, decoded; a `ValueError` for one that cannot be read or cut into crops."""
    images = [open_picture({"path": str(path), "bytes": None}) for path in prompt.images]
    for path, image in zip(prompt.images, images, strict=True):
        try:
            image.load()
            loaded.processor.image_processor.num_image_tokens(image.width, image.height)
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"the picture {path} cannot be read: {error}") from error
    return images


def answer_live(loaded: Loaded, prompt: Prompt, *, max_new_tokens: int) -> None:
    """Answers one prompt on the terminal, word by word, and shows the fields that the answer has."""
    messages = with_pictures(prompt.messages, _pictures(loaded, prompt))
    inputs = loaded.processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    ).to(loaded.model.device)
    streamer = TextStreamer(loaded.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.no_grad():
        ids = loaded.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, streamer=streamer)
    if loaded.task.answer is not None:
        text = loaded.processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        fields = Template(loaded.task.answer).parse(text)
        print("\n".join(f"  {name}: {value}" for name, value in fields.items()) if fields else "  (another form)")


@contextlib.contextmanager
def _output(path: Path | None) -> Iterator[IO[str]]:
    """Standard output, or a file that has its name only when all of it is there."""
    if path is None:
        yield sys.stdout
        return
    aside = path.with_name(f"{path.name}.part")
    with aside.open("w", encoding="utf-8") as file:
        yield file
    os.replace(aside, path)


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m sft_phi3v.generate --model MODEL INPUT …`"""
    options = generate_options(argv)
    output = Path(options.output) if options.output else None
    try:
        loaded = load(options.model, base_model=options.base_model, num_crops=options.num_crops)
        asked = list(prompts(options.inputs, options.prompt or loaded.task.prompt))
        longest = options.max_new_tokens or loaded.task.max_new_tokens
        if len(asked) == 1 and output is None:
            answer_live(loaded, asked[0], max_new_tokens=longest)
            return
        batch_size = options.batch_size or loaded.task.generation_batch_size
        failed = 0
        with _output(output) as file:
            for answer in answers(loaded, asked, max_new_tokens=longest, batch_size=batch_size):
                failed += "error" in answer
                if output is not None and output.suffix == ".jsonl":
                    print(json.dumps(answer, ensure_ascii=False), file=file)
                else:
                    name = answer.get("image") or ", ".join(answer.get("images", [])) or "-"
                    print(f"{name}\t{answer.get('text', 'error: ' + answer.get('error', ''))}", file=file)
    except BrokenPipeError:  # whoever reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    except (ValueError, OSError) as error:
        Parser().error(str(error))
    if failed:
        raise SystemExit(f"error: {failed} of {len(asked)} inputs could not be read; the answers say which and why.")


if __name__ == "__main__":
    main()
