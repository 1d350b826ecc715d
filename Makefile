# The verbs that people and CI share. `make help` lists them.
#
# One virtual environment, made once: each stamp in it depends on the files it was installed from, so a second
# run of any verb installs nothing. `serve` needs the runtime half only; `test`, `check` and `bench` add the rest.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# An NVIDIA driver decides which build of torch is installed; TORCH_BUILD=cpu or =cuda overrules it.
TORCH_BUILD ?= $(shell if [ -e /proc/driver/nvidia/version ] || command -v nvidia-smi >/dev/null 2>&1; then echo cuda; else echo cpu; fi)
UV_VERSION := 0.13.9

BIN := $(VENV)/bin
# --no-deps everywhere: the locks are complete. -qq leaves errors only.
PIP_INSTALL := -m pip -qq --disable-pip-version-check install --root-user-action=ignore --no-deps
INSTALL := $(BIN)/python $(PIP_INSTALL)
CREATED := $(VENV)/.created
TORCH := $(VENV)/.torch-$(TORCH_BUILD)
RUNTIME := $(VENV)/.runtime
DEV := $(VENV)/.dev
DEPLOY_TOOLS := $(VENV)/.deploy

.PHONY: help
help:  ## List the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' Makefile

.PHONY: serve
serve: $(RUNTIME)  ## Serve the embedded Gemma 3 270M; options: make serve ARGS="--port 8123"
	@$(BIN)/gemma-server serve $(ARGS)

.PHONY: test
test: $(DEV)  ## Run all tests but the slow ones; options: make test ARGS="-k tokenizer"
	@$(BIN)/python -m pytest $(ARGS)

.PHONY: test-slow
test-slow: $(DEV)  ## Run the slow tests; chaos and soak have verbs of their own
	@$(BIN)/python -m pytest -m "slow and not gpu and not network" --ignore tests/chaos --ignore tests/soak $(ARGS)

.PHONY: test-gpu
test-gpu: $(DEV)  ## Run the kernels' and the device steps' tests on an NVIDIA GPU, without which those that need it are skipped
	@$(BIN)/python -m pytest -m "gpu or not slow" tests/gpu tests/triton tests/device_step $(ARGS)

.PHONY: check
check: $(DEV)  ## Format, lint, types, layout and import direction
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_house.py

.PHONY: fix
fix: $(DEV)  ## Format, and fix what the linter can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: bench
bench: $(DEV)  ## Serve the embedded model and print the load generator's table; results in benchmarks/results/
	@$(BIN)/python -m benchmarks.run $(ARGS)

.PHONY: bench-quality
bench-quality: $(DEV)  ## Perplexity and greedy agreement of each number format on the embedded model
	@$(BIN)/python -m benchmarks.quality $(ARGS)

.PHONY: bench-structured
bench-structured: $(DEV)  ## Throughput with and without a JSON schema, and the time to compile one
	@$(BIN)/python -m benchmarks.structured $(ARGS)

.PHONY: bench-batch
bench-batch: $(DEV)  ## What clients notice of a batch that runs beside them
	@$(BIN)/python -m benchmarks.beside_batch $(ARGS)

.PHONY: bench-front
bench-front: $(DEV)  ## What the HTTP side delivers, and how late, with a stand-in for the engine
	@$(BIN)/python -m benchmarks.front.run $(ARGS)

.PHONY: bench-gpu
bench-gpu: $(DEV)  ## Step times on an NVIDIA GPU as multiples of what it could do, and throughput; 8 minutes, 22 GB of disk
	@$(BIN)/python -m benchmarks.gpu.run $(ARGS)

.PHONY: bench-host
bench-host: $(DEV)  ## What a step of decodes costs the host that runs a GPU, by part
	@$(BIN)/python -m benchmarks.host_step $(ARGS)

.PHONY: bench-peers
bench-peers: $(DEV)  ## Measure vLLM, llama.cpp and this server in one run for docs/performance.md; ARGS="--help" lists its options
	@$(BIN)/python -m benchmarks.peers.run $(ARGS)

.PHONY: rolling-restart
rolling-restart: $(DEV)  ## Restart two replicas in turn behind HAProxy, while 80 streams run
	@$(BIN)/python -m pytest -m slow -s tests/e2e/test_rolling_restart.py $(ARGS)

.PHONY: image-check
image-check: $(DEV)  ## Build the container image without an engine, and run it read-only and without rights
	@$(BIN)/python -m pytest -m slow -s tests/deploy/test_image.py $(ARGS)

.PHONY: fuzz
fuzz: $(DEV)  ## 5,000 requests made from the OpenAPI document, right and wrong ones, to a real server
	@$(BIN)/python -m pytest -m slow tests/fuzz $(ARGS)

.PHONY: chaos
chaos: $(DEV)  ## Real servers under load whose engines are killed, stopped and crashed, and which are starved and left
	@$(BIN)/python -m pytest -m "not gpu and not network" tests/chaos $(ARGS)

.PHONY: soak
soak: $(DEV)  ## 10,000 requests of all kinds to a real server: nothing may leak or grow; options: ARGS="--requests 2000"
	@$(BIN)/python -m tests.soak.soak $(ARGS)
	@$(BIN)/python -m pytest -m slow tests/soak/test_grammars.py tests/soak/test_residue.py

.PHONY: observe-check
observe-check: $(DEV)  ## A real Prometheus (apt-get install prometheus chromium) scrapes a real server; an alert fires
	@$(BIN)/python -m pytest -m slow -s tests/deploy/test_monitoring.py $(ARGS)

.PHONY: conformance
conformance: $(DEV)  ## Ask this server for all that OpenAI's API promises; another: ARGS="--base-url http://host:8000"
	@$(BIN)/python -m conformance $(ARGS)

.PHONY: conformance-peers
conformance-peers: $(DEV)  ## Ask llama.cpp's server, too, and write docs/conformance.md
	@$(BIN)/python -m conformance.peers $(ARGS)

.PHONY: test-sdk
test-sdk: $(DEV)  ## Run the official SDKs and an agent framework against the embedded model; Node's comes from npm
	@$(BIN)/python -m pytest -m "not gpu and not network" tests/sdk $(ARGS)

.PHONY: deploy-check
deploy-check: $(DEV) $(DEPLOY_TOOLS)  ## Build all manifests, lint and validate them and the Dockerfile; CRDS=DIR has schemas of custom resources
	@$(BIN)/python -m tools.deploy_check --tools $(VENV)/deploy/bin $(if $(CRDS),--crds $(CRDS)) $(ARGS)

.PHONY: docs
docs: $(DEV)  ## Write the pages and manifests that are made from something else: options, limits, reliability, rules, dashboard
	@$(BIN)/python -m tools.gen_options
	@$(BIN)/python -m tools.gen_limits
	@$(BIN)/python -m tools.gen_dashboard
	@$(BIN)/python -m tools.gen_reliability
	@$(BIN)/python -m tools.gen_rules

.PHONY: setup
setup: $(DEV)  ## Make the environment for development, and the git hook
	@$(BIN)/pre-commit install

.PHONY: lock
lock: $(VENV)/.uv  ## Resolve requirements/*.lock anew (UPGRADE=--upgrade takes newer releases)
	$(LOCK) --universal --override requirements/no-torch.txt --extra embedded --extra gcs --extra otel \
	    pyproject.toml requirements/torch-deps.in -o requirements/runtime.lock
	$(LOCK) --universal --override requirements/no-torch.txt --extra dev -c requirements/runtime.lock \
	    pyproject.toml requirements/torch-deps.in -o requirements/dev.lock
	$(LOCK) --python-platform x86_64-manylinux_2_28 -c requirements/runtime.lock $(CARRIED_BY_RUNTIME:%=--no-emit-package %) \
	    requirements/torch-cuda.in -o requirements/torch-cuda.lock
	$(LOCK) --universal requirements/deploy-tools.in -o requirements/deploy-tools.lock

UPGRADE ?=
LOCK = $(VENV)/uv/bin/uv pip compile --quiet --python-version 3.11 --generate-hashes --custom-compile-command "make lock" $(UPGRADE)
CARRIED_BY_RUNTIME := filelock fsspec jinja2 markupsafe mpmath networkx setuptools sympy typing-extensions

.PHONY: clean
clean:  ## Remove the environment, caches and build products
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

# --- the environment ---------------------------------------------------------------------------------------

$(CREATED):
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else "gemma-server needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is %d.%d: name another with PYTHON=python3.12" % v)'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments: apt-get install python3-venv" >&2; exit 1; }
	@echo "Making the environment $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.torch-cpu: requirements/torch-cpu.txt $(CREATED)
	@echo "Installing the CPU build of torch (once, about 200 MB)"
	@# A build that pip is already configured to find (find-links, a mirror) saves the trip to TORCH_INDEX.
	@$(INSTALL) -r requirements/torch-cpu.txt 2>/dev/null || $(INSTALL) --index-url $(TORCH_INDEX) -r requirements/torch-cpu.txt
	@rm -f $(VENV)/.torch-*
	@touch $@

$(VENV)/.torch-cuda: requirements/torch-cuda.lock $(CREATED)
	@echo "Installing the CUDA build of torch (once, about 3 GB)"
	@$(INSTALL) --require-hashes -r requirements/torch-cuda.lock
	@rm -f $(VENV)/.torch-*
	@touch $@

$(RUNTIME): requirements/runtime.lock pyproject.toml $(TORCH)
	@echo "Installing the server and the embedded model (once, about 300 MB)"
	@$(INSTALL) --require-hashes -r requirements/runtime.lock
	@$(INSTALL) --no-build-isolation --editable .
	@$(BIN)/python -m server.engine.backend.native_library
	@touch $@

$(DEV): requirements/dev.lock $(RUNTIME)
	@echo "Installing the development tools (once)"
	@$(INSTALL) --require-hashes -r requirements/dev.lock
	@touch $@

# Apart, since checkov pins other versions of what the development tools have, too.
$(DEPLOY_TOOLS): requirements/deploy-tools.lock $(CREATED)
	@echo "Installing the tools that check manifests (once, in an environment of their own)"
	@$(PYTHON) -m venv --clear $(VENV)/deploy
	@$(VENV)/deploy/bin/python $(PIP_INSTALL) --require-hashes -r requirements/deploy-tools.lock
	@touch $@

$(VENV)/.uv: $(CREATED) Makefile
	@$(PYTHON) -m venv $(VENV)/uv
	@$(VENV)/uv/bin/python -m pip install --quiet --root-user-action=ignore uv==$(UV_VERSION)
	@touch $@
