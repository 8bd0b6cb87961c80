# Every target sets up .venv by itself. pip's own settings (index, find-links) decide which build of torch is used.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# torch goes first and alone: a build that is already at hand (CPU or CUDA) then counts as the one that the rest needs.
TORCH := $(shell grep '^torch==' constraints.txt)
# The oldest supported versions of what moves most, for test-lower.
OLDEST := $(shell sed -nE 's/^ *"(transformers|peft|accelerate|safetensors)>=([0-9.]+).*/\1==\2/p' pyproject.toml)

# How result files call this machine, amd-epyc-2-cores for one; asked when a benchmark runs, never for the build.
MACHINE = $(shell $(BIN)/python -W ignore -c "from benchmarks.quality.summary import machine_slug; from lemo_hf.profiling.provenance import provenance; print(machine_slug(provenance()['machine']))")

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-all test-lower lint format bench ratios base

help:                ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	@echo "Setting up .venv (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[train,bench,dev]"
	@touch $@

install: $(STAMP)    ## set up .venv with the exact versions of constraints.txt

quickstart: $(STAMP) ## three fine-tuning arms on a small real model, in minutes; results in outputs/quickstart
	@$(BIN)/python -m lemo_hf.quickstart

test: $(STAMP)       ## the tests that run at every change
	@$(BIN)/python -m pytest

test-all: $(STAMP)   ## those and the slow ones
	@$(BIN)/python -m pytest -m ""

test-lower:          ## all of them on the oldest supported versions, in .venv-lower
	@test -x .venv-lower/bin/python || $(PYTHON) -m venv .venv-lower
	@grep -vE '^(transformers|tokenizers|huggingface_hub|peft|accelerate|safetensors)==' constraints.txt > .venv-lower/constraints.txt
	@.venv-lower/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	@.venv-lower/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-lower/constraints.txt $(OLDEST) -e ".[train,bench,dev]"
	@.venv-lower/bin/python -m pytest -p no:cacheprovider -m ""

lint: $(STAMP)       ## style and types
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "Not formatted: run 'make format'"; exit 1; }
	@$(BIN)/mypy --no-error-summary
	@echo "lint: clean"

format: $(STAMP)     ## put the code into the style that lint checks
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format --quiet .

bench: $(STAMP)      ## methods side by side on the embedded model, counts at 8B shapes; results in benchmarks/results and README.md
	@$(BIN)/lemo bench --model python-llama-4m --seq-len 4096 --methods stock,longlora,lemo-artifact,random-ltd,tokentune,lemo-exact,lemo-exact@0.3,lemo-exact-rows,lemo-keys,lemo-keys@0.3,lemo-keys-rows,lemo-sparse,lemo-sparse-nearby --steps 3 --repeats 3 \
		--perplexity benchmarks/results/quickstart--amd-epyc-2-cores.json --out benchmarks/results/bench_small--$(MACHINE).json
	@$(BIN)/python -W ignore::FutureWarning benchmarks/layer_arithmetic.py --out benchmarks/results/layer_arithmetic--any.json
	@$(BIN)/python -W ignore::FutureWarning benchmarks/phase_flops.py
	@$(BIN)/python benchmarks/update_readme.py
	@$(BIN)/python benchmarks/update_model_cards.py

ratios: $(STAMP)     ## a step of stock LoRA and of ours on the embedded model: time, FLOPs, saved bytes, in a minute or so
	@$(BIN)/lemo bench --model python-llama-4m --seq-len 4096 --methods stock,lemo-exact,lemo-keys --steps 1 --repeats 1 \
		--perplexity benchmarks/results/quickstart--amd-epyc-2-cores.json --out outputs/ratios.json

base: $(STAMP)       ## train the embedded base model anew (hours; resumes where it stopped)
	@$(BIN)/python -m lemo_hf.base_model recipes/base_python_1k.yaml
	@$(BIN)/python -m lemo_hf.base_model.predictors
