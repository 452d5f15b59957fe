# Every command that people and CI use. `make` alone explains them.
.DEFAULT_GOAL := help
.PHONY: help install up check test unit chaos bench docs clean

VENV ?= .venv
export VENV
BIN := $(VENV)/bin
PYTEST := $(BIN)/pytest -q
# pytest refuses a folder that is not there, so only those that are.
UNIT := $(wildcard tests/unit tests/property tests/contract tests/surface)
SUITES := $(UNIT) $(wildcard tests/integration tests/e2e)

help: ## explain the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

install: ## make the virtual environment, or bring it up to date
	@scripts/install

up: install ## start a whole cluster on this machine (ARGS= goes to `inferpipe up`)
	@$(BIN)/inferpipe up $(ARGS)

check: ## format, lint, types, imports; says all that is wrong, not only the first
	@failed=; \
	$(BIN)/ruff format --check --quiet . || failed="$$failed format"; \
	$(BIN)/ruff check --quiet . || failed="$$failed lint"; \
	$(BIN)/mypy || failed="$$failed types"; \
	$(BIN)/lint-imports || failed="$$failed imports"; \
	if [ -n "$$failed" ]; then echo "check failed:$$failed"; exit 1; fi

# In order, even with -j: nothing else can be right while the environment or the checks are not.
test: ## install, check, then every suite but chaos
	@$(MAKE) --no-print-directory install
	@$(MAKE) --no-print-directory check
	@$(PYTEST) --durations=15 $(SUITES)

unit: ## the suites that need no process but pytest
	@$(PYTEST) $(UNIT)

chaos: ## kill things while they work, and check the promises
	@$(PYTEST) --durations=15 tests/chaos

bench: ## measure: the link, overhead, workflows beside the peers, tokens, sockets, sessions, footprint, routing, the plane
	@for bench in link overhead fairness peers tokens webhooks retention footprint openai routing plane websocket sessions; do \
		echo "== loadtests/$$bench.py"; $(BIN)/python -m loadtests.$$bench || exit 1; done

docs: ## write the generated pages: states and settings
	@$(BIN)/python scripts/docs

clean: ## remove caches and build leftovers, not the environment or any data
	@rm -rf build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache *.egg-info
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
