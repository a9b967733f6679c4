"""The repository itself: imports point one way, every recipe loads, and the documents name what exists."""

import ast
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from sft_phi3v.recipe import (
    PrepareArguments,
    PreviewArguments,
    PublishArguments,
    ScoringArguments,
    TaskArguments,
    load_recipe,
)

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "sft_phi3v"
RECIPES = sorted(path.name for path in (REPOSITORY / "recipes").glob("*.yaml"))

# Later layers may import earlier ones; modules of one layer do not know each other.
LAYERS = [
    ["phi3_v"],
    ["recipe", "activations", "catalogue", "charts", "fetch", "splitting", "vllm_plugin"],
    ["usage", "data", "collator", "model", "pictures", "samples", "engine", "checkpoints", "machine", "interruption"],
    ["streaming", "checking", "batches"],
    ["estimate"],
    ["deciding", "fit", "features"],
    ["prepare", "preview", "scoring"],
    ["evaluation"],
    ["tracking"],
    ["merge", "card", "gallery"],
    ["hub", "report", "generate"],
    ["trainer"],
    ["run"],
    ["demo", "tiny_base"],
]

VERBS = sorted(path.stem for path in PACKAGE.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))


def module_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "phi3_v" if parts[0] == "phi3_v" else parts[0]


def own_imports(path):
    """Modules of this package that a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: `accelerate launch sft_phi3v/run.py` needs absolute imports"
            names = [node.module]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name.startswith("sft_phi3v.")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    module = module_of(path)
    if module == "__init__":
        assert not own_imports(path)
        return
    layer = next(index for index, names in enumerate(LAYERS) if module in names)
    allowed = {name for names in LAYERS[:layer] for name in names} | {module}
    assert own_imports(path) <= allowed


def test_no_module_shadows_a_library_when_the_package_folder_is_first_on_the_path():
    # `accelerate launch sft_phi3v/run.py` puts the package folder itself there.
    taken = {"datasets", "evaluate", "inspect", "types", "logging", "tokenize", "wandb", "utils", "accelerate", "peft"}
    assert not taken & {path.stem for path in PACKAGE.iterdir()}


def told(*words):
    """Runs Python with these words; gives its exit status, what it prints, and the libraries that it imported."""
    command = [sys.executable, "-X", "importtime", *words]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120)
    imported = {line.split("|")[-1].strip().split(".")[0] for line in ended.stderr.splitlines() if "|" in line}
    said = [line for line in ended.stderr.splitlines() if not line.startswith("import time:")]
    return ended.returncode, "\n".join([ended.stdout, *said]), imported


@pytest.mark.parametrize(
    "words",
    [
        *(["-m", f"sft_phi3v.{verb}", "--help"] for verb in VERBS),
        ["sft_phi3v/run.py", "--help"],
        ["sft_phi3v/run.py"],
        ["sft_phi3v/run.py", "recipes/brubery.yaml"],
        ["-m", "sft_phi3v.generate", "--model", "outputs/tiny", "no-such.jpg"],
    ],
    ids=" ".join,
)
def test_help_and_what_is_plainly_wrong_wait_for_no_heavy_import(words):
    status, said, imported = told(*words)
    assert status == (0 if words[-1] == "--help" else 1 if words[-1].endswith(".yaml") else 2)
    assert said.strip().startswith("usage:" if words[-1] in ("--help", "sft_phi3v/run.py") else "error:")
    assert "argparse" in imported
    assert not imported & {"torch", "transformers", "peft", "accelerate", "datasets", "scipy", "matplotlib", "wandb"}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_loads_with_todays_libraries(name, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    for variable in ("WANDB_PROJECT", "WANDB_MODE"):
        monkeypatch.setenv(variable, "before")  # a recipe's `env:` block sets such; put back afterwards
    recipe = load_recipe([f"recipes/{name}"])
    assert recipe.training.output_dir.startswith("outputs/")
    assert recipe.task.answer


def test_the_table_of_recipes_names_them_all():
    text = (REPOSITORY / "recipes" / "README.md").read_text(encoding="utf-8")
    assert {name for name in RECIPES if name in text} == set(RECIPES)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_accelerate_config_is_one(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_machines == yaml.safe_load(path.read_text())["num_machines"]


def test_make_help_lists_the_menu_and_the_readme_types_only_what_is_on_it():
    menu = subprocess.run(
        ["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=30
    ).stdout
    targets = set(re.findall(r"^  make ([a-z-]+)", menu, flags=re.MULTILINE))
    assert {"demo", "test", "train", "preview", "evaluate"} <= targets
    for document in ("README.md", "CONTRIBUTING.md", ".ci/run"):
        text = (REPOSITORY / document).read_text(encoding="utf-8")
        typed = set(re.findall(r"^\s*(?:`{1,3})?make ([a-z-]+)", text, flags=re.MULTILINE)) | set(
            re.findall(r"`make ([a-z-]+)", text)
        )
        assert typed
        assert typed <= targets, f"{document} names what the Makefile lacks"


def test_documents_link_to_files_that_exist():
    for document in REPOSITORY.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (REPOSITORY / target).exists(), f"{document.name} links to {target}"


@pytest.mark.parametrize(
    ("document", "arguments"),
    [
        ("README.md", TaskArguments),
        ("docs/prepare.md", PrepareArguments),
        ("docs/preview.md", PreviewArguments),
        ("docs/scores.md", ScoringArguments),
        ("docs/publish.md", PublishArguments),
    ],
)
def test_the_documents_explain_every_key_of_ours_with_its_default(document, arguments):
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    defaults = arguments()
    for key in fields(arguments):
        line = f"| `{key.name}` | `{json.dumps(getattr(defaults, key.name))}` | {key.metadata['help']} |"
        assert line in text, f"{document} lacks: {line}"


def test_the_page_on_preparing_explains_every_reason():
    text = (REPOSITORY / "docs" / "prepare.md").read_text(encoding="utf-8")
    code = "".join((PACKAGE / f"{name}.py").read_text() for name in ("fetch", "pictures", "checking", "deciding"))
    reasons = set(re.findall(r'(?:Refusal|_Passing)\(\s*"(\w+)"|reason\[row\], detail\[row\] = "(\w+)"', code))
    assert len(reasons) > 15
    assert {one or other for one, other in reasons} <= set(re.findall(r"`(\w+)`", text))


def test_versions_are_pinned_once():
    pins = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().split())
    assert {
        "torch",
        "transformers",
        "trl",
        "peft",
        "accelerate",
        "datasets",
        "bitsandbytes",
        "wandb",
        "pillow",
    } <= pins.keys()


def test_nothing_of_microsofts_and_no_pickle_is_committed():
    files = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=30)
    if files.returncode:
        pytest.skip("not a git checkout")
    for name in files.stdout.split():
        assert Path(name).suffix not in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}, name
        if Path(name).name == "tokenizer.json":
            assert (REPOSITORY / name).stat().st_size < 200_000, f"{name} is too large to be our own"
