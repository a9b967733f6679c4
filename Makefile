# The menu. `make demo` and `make test` do their own set-up; everything else does too.
VENV ?= .venv
RECIPE ?= recipes/tiny.yaml
ACCELERATE ?=
ARGS ?=
PYTHON3 ?= python3
BIN := $(VENV)/bin
LAUNCH := $(BIN)/accelerate launch $(if $(ACCELERATE),--config_file accelerate_configs/$(ACCELERATE).yaml)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-distributed bench bench-gpu lint types prepare train preview evaluate report merge push-hub tiny-base clean

help:  ## this menu
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  RECIPE=recipes/burberry.yaml  ACCELERATE=ddp  ARGS='--max_steps 20'  say what, on what, and with which changes"

setup: $(VENV)/.ready  ## the virtual environment, as constraints.txt pins it

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; say which: make PYTHON3=python3.12 …"; exit 1; }
	@$(PYTHON3) -m venv $(VENV) || { echo "On Debian: apt install python3-venv"; exit 1; }
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .[dev]
	@touch $@

demo: setup  ## fine-tune, score and save a tiny model on drawn pictures: CPU, no network, some minutes
	$(BIN)/python -m sft_phi3v.demo

train: setup  ## fine-tune and score RECIPE
	$(LAUNCH) sft_phi3v/run.py $(RECIPE) $(ARGS)

prepare: setup  ## fetch and check the pictures of RECIPE's source, and write its data set
	$(BIN)/python -m sft_phi3v.prepare $(RECIPE) $(ARGS)

preview: setup  ## show what RECIPE would train on, and what is missing; no GPU needed
	$(BIN)/python -m sft_phi3v.preview $(RECIPE) $(ARGS)

evaluate: setup  ## score what RECIPE trained, or any model: ARGS=--model=NAME
	$(LAUNCH) sft_phi3v/evaluation.py $(RECIPE) $(ARGS)

report: setup  ## one page on what RECIPE trained: output_dir/report.html
	$(BIN)/python -m sft_phi3v.report $(RECIPE) $(ARGS)

merge: setup  ## merge what RECIPE trained into one model, and prove it
	$(BIN)/python -m sft_phi3v.merge $(RECIPE) $(ARGS)

push-hub: setup  ## publish the merged model on the Hub, with its card (ARGS='--dry_run true' only shows it)
	$(BIN)/python -m sft_phi3v.hub $(RECIPE) $(ARGS)

tiny-base: setup  ## rebuild the demo's base model, recipes/tiny_base
	$(BIN)/python -m sft_phi3v.tiny_base --output_dir recipes/tiny_base

test: setup  ## the tests: offline, CPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: setup  ## the tests that take minutes, the demo's scores among them
	$(BIN)/python -m pytest -m slow

test-distributed: setup  ## several processes, FSDP2, two machines, kills: one recipe, one result (minutes)
	$(BIN)/python -m pytest -m "distributed and not slow"

bench: setup  ## how fast, lever by lever, against the plain way in the same run; CPU, an hour alone on the machine
	$(BIN)/python benchmarks/speed.py levers growth input generation compiled
	$(BIN)/python benchmarks/speed.py train --rows 1 2
	$(BIN)/python benchmarks/features.py
	$(BIN)/python benchmarks/preprocessing.py
	$(BIN)/python benchmarks/planning.py
	$(BIN)/python benchmarks/startup.py

bench-gpu: setup  ## Phi-3-vision's size, random weights, nothing to download: QLoRA and LoRA, 4 and 16 crops
	$(BIN)/python benchmarks/speed.py train --size full --rows 1 2 4 8
	$(BIN)/python benchmarks/dequantise.py

lint: setup  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup  ## mypy
	$(BIN)/mypy

clean:  ## remove the virtual environment (what was trained stays)
	rm -rf $(VENV)
