# Every target makes .venv by itself (a few minutes, once). `make` lists the targets.
PYTHON ?= python3.11

# Options of the targets. Set them behind make: `make sweep DATASET=mtd K=5 TRIALS=20`.
TASK :=
DATASET :=
ROOT :=
K :=
TRIALS :=
RESUME :=
MODEL :=
LONG :=
ARGS :=

BIN := .venv/bin
LOCAL := $(BIN)/python -m cluster.local
SWEEP := $(if $(TASK),--task '$(TASK)') $(if $(DATASET),--dataset '$(DATASET)') $(if $(ROOT),--root '$(ROOT)') $(if $(K),--k-shot '$(K)') \
         $(if $(TRIALS),--trials '$(TRIALS)') $(if $(filter-out 0,$(RESUME)),--resume) $(ARGS)

PROOFS := slow$(if $(LONG),, and not long)

.DEFAULT_GOAL := help
.PHONY: help setup sweep dashboard serve stop test proofs mutants lint bench clean
.NOTPARALLEL:

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: .venv/.installed ## make .venv with the exact versions of constraints.txt

.venv/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.exit(None if v == "3.11" else "$(PYTHON) is Python " + v + ", hypdefect needs 3.11: make PYTHON=/path/to/python3.11")'
	@echo "installing into .venv: a few minutes, once, and again when constraints.txt changes" >&2
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev,dashboard]'
	@touch $@

sweep: .venv/.installed ## search hyperparameters as a Ray job on a local head or on RAY_ADDRESS (TASK DATASET ROOT K TRIALS RESUME ARGS)
	@$(LOCAL) submit -- python jobs/sweep.py $(SWEEP)
	@$(LOCAL) dashboard

dashboard: .venv/.installed ## the sweep's pages: optuna-dashboard and TensorBoard, in the background
	@$(LOCAL) dashboard $(ARGS)

serve: .venv/.installed ## deploy a registered model (MODEL=name@alias) and wait until it answers
	@$(LOCAL) serve $(if $(MODEL),--model '$(MODEL)') $(ARGS)

stop: .venv/.installed ## stop the head and the dashboards this checkout started, and nothing else
	@$(LOCAL) stop

test: .venv/.installed ## the tests, minutes; the end-to-end ones last (ARGS go to pytest, then in one process)
ifeq ($(strip $(ARGS)),)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not ray and not e2e and not slow"
	$(BIN)/python -m pytest -m "(ray or e2e) and not slow"
else
	$(BIN)/python -m pytest $(ARGS)
endif

proofs: .venv/.installed ## the slow tests that CI runs besides (LONG=1: also those it has no time for)
	$(BIN)/python -m pytest -q -n 2 --dist load -m "$(PROOFS) and not ray and not e2e" $(ARGS)
	$(BIN)/python -m pytest -m "$(PROOFS) and (ray or e2e)" $(ARGS)

mutants: .venv/.installed ## break lines one at a time: the tests must notice (ARGS name some)
	$(BIN)/python -m tests.mutants.run $(ARGS)

lint: .venv/.installed ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.installed ## time the hot paths (ARGS go to jobs/benchmark.py)
	$(BIN)/python jobs/benchmark.py $(ARGS)

clean: ## stop what runs, then remove .venv, .ray and caches (never data or results)
	@test ! -e .venv/.installed || $(LOCAL) stop
	rm -rf .venv .ray build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
