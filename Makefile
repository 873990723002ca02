# Two commands do all the set-up on a machine that has Python 3.11+ and nothing else:
#   make demo   the main job, end to end, on embedded Kafka and Redis
#   make test   the suite; in CI with the slow tests of faults, and coverage
#
# TORCH_BACKEND chooses PyTorch's build (cpu, cu128, …; see `uv pip install --torch-backend`).
# Unset, it is PyPI's, which is the CUDA build on Linux and runs on a CPU too.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH_BACKEND ?=
TESTS ?= tests
# Broker tests mostly wait, so several run at a time, each worker with a broker and a Redis of its own: on two cores, two workers
# leave a fifth of the processors idle. Many more than cores make the limits of the tests longer, not the run shorter.
WORKERS ?= 3
# Those of faults wait more than others: for sessions to end, for brokers to come back.
SLOW_WORKERS ?= 4
# Some of what `make unit` runs waits, for timers and threads: one worker more than cores fills that. Its files share nothing, so a
# worker that is done takes tests of another one.
UNIT_WORKERS ?= $(shell expr `getconf _NPROCESSORS_ONLN` + 1)
# `make faults`: at-least-once or exactly-once; without a seed a random one, which is printed.
FAULTS_JOBS ?= 200000
FAULTS_MODE ?= at-least-once
FAULTS_SEED ?=
FUZZ_INPUTS ?= 1000000
FUZZ_SEED ?= 1
KINDS ?=
# Measuring every process, each replica's too, makes it a quarter slower: CI does it, and whoever asks. The tests of faults run after
# that, unmeasured: they need time more than it needs them, since what they run could only add to the number.
COVERAGE ?= $(CI)
# Tests of faults take half of the suite's time: CI runs them, and whoever changes what they are about. Those that only go on for
# longer (fifty reloads, twenty thousand rows, every architecture) are for the days before a release.
SLOW ?= $(CI)
SOAK ?=
# Importing torch and transformers compiles thousands of files; keeping the result makes the next start seconds faster.
unexport PYTHONDONTWRITEBYTECODE
# A file's tests stay together, for what they share; files start in the order that tests/conftest.py gives.
parallel = $(if $(filter-out 0 1,$(1)),-n $(1) --dist loadfile --no-loadscope-reorder)
PARALLEL := $(call parallel,$(WORKERS))
tier = -m '$(1)'
TIER := $(if $(SOAK),,$(call tier,$(if $(SLOW),not soak,not slow and not soak)))
# What runs after what is measured.
MORE := $(if $(SOAK),slow or soak,$(if $(SLOW),slow and not soak))
NONE_SELECTED := 5
# The files that have some of those: each worker would import the other nine tenths for nothing.
MARKED = $(or $(sort $(shell grep -rlsE --include='test_*.py' 'mark\.(slow|soak)' $(TESTS))),$(TESTS))
UV := UV_LINK_MODE=hardlink $(BIN)/uv

.PHONY: help setup demo lint types check test suite unit matrix faults fuzz architectures check format contract docs constraints pin-images sbom bench clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1 \t/' | expand -t 20

$(BIN)/.ready: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit("embedq needs Python 3.11 or newer, this is %s; run make PYTHON=/path/to/python3.11" % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv
	$(UV) pip install -q --python $(BIN)/python $(if $(TORCH_BACKEND),--torch-backend $(TORCH_BACKEND)) \
		-c constraints.txt -e '.[batch-lancedb,batch-milvus,batch-postgresql,batch-qdrant,cli,cpu,dev,gateway-s3,haystack,langchain,llama-index,schema-registry]' --group test
	@touch $@

setup: $(BIN)/.ready ## the virtual environment, with everything in it

demo: setup ## the main job on real sentences, end to end
	@$(BIN)/python -m demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tools.schemas --check
	$(BIN)/python -m tools.openapi --check
	$(BIN)/python -m tools.settings_page --check
	$(BIN)/python -m tools.broker_errors_page --check
	$(BIN)/python -m tools.pin_images --check

types: setup
	$(BIN)/mypy

# The types are checked beside the first tests, which mostly wait: in a fresh clone that takes two minutes of a processor.
test: lint ## lint, types, generated files and the suite (SLOW=1 with the faults that CI runs, too, SOAK=1 with the long runs as well; TESTS=path a part of it; COVERAGE=1 how much of the code ran)
	@$(MAKE) --no-print-directory -j2 suite types

suite: setup
ifeq ($(COVERAGE),)
	$(BIN)/python -m pytest $(PARALLEL) $(TIER) $(TESTS)
else
	$(BIN)/python -m coverage erase
	@set -x; failed=0; \
	$(BIN)/python -m coverage run -m pytest $(PARALLEL) $(call tier,not slow and not soak) $(TESTS) || failed=$$?; \
	$(if $(MORE),$(BIN)/python -m pytest $(call parallel,$(SLOW_WORKERS)) $(call tier,$(MORE)) $(MARKED) || [ $$? = $(NONE_SELECTED) ] || failed=1;) \
	exit $$failed
	$(BIN)/python -m coverage combine -q
	$(BIN)/python -m coverage report $(if $(filter tests,$(TESTS)),,--fail-under=0)
endif

check: lint types ## lint, types, generated files

unit: setup ## the tests that need no broker, no Redis and no model, in half a minute
	EMBEDQ_TEST_EXAMPLES=20 $(BIN)/python -m pytest -n $(UNIT_WORKERS) --dist worksteal tests/unit

matrix: ## the suite on each Python and each Kafka that are supported; `.ci/matrix` says which
	@.ci/matrix

faults: setup ## a long mix of faults on three brokers, with a checker's verdict (FAULTS_JOBS, FAULTS_SEED, FAULTS_MODE)
	$(BIN)/python -m tests.faults --jobs $(FAULTS_JOBS) --mode $(FAULTS_MODE) $(if $(FAULTS_SEED),--seed $(FAULTS_SEED))

fuzz: setup ## each decoder against a million inputs (FUZZ_INPUTS, FUZZ_SEED)
	$(BIN)/python -m tests.fuzz --decoder all --inputs $(FUZZ_INPUTS) --seed $(FUZZ_SEED)

architectures: setup ## each architecture of transformers in a tiny form: served with its vectors, or refused (KINDS="mpnet t5")
	$(BIN)/python -m tests.architectures $(KINDS)

format: setup ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

contract: setup ## write the JSON Schemas, and the gateway's OpenAPI document and its page
	$(BIN)/python -m tools.schemas
	$(BIN)/python -m tools.openapi

docs: setup ## write docs/settings.md and docs/broker-errors.md
	$(BIN)/python -m tools.settings_page
	$(BIN)/python -m tools.broker_errors_page

constraints: setup ## pin anew what CI and this file install
	$(UV) pip compile -q --universal --python-version 3.11 --no-emit-index-url --no-annotate --no-header \
		--all-extras --group test -o constraints.txt pyproject.toml

pin-images: setup ## name the images by the digests that their registries report now (needs docker or crane, and the network)
	$(BIN)/python -m tools.pin_images

sbom: setup ## build/sbom.cdx.json: every package that the service and its command line run on (CycloneDX)
	$(BIN)/python -m tools.sbom build/sbom.cdx.json

bench: setup ## jobs per second, cold and cached, next to sentence-transformers
	$(BIN)/python -m benchmarks.pipeline

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage.d
