# Everything here sets up what it needs: Python 3.11 or newer, git and make are enough.
#
# .venv       development: duly editable, with every tool
# .venv-test  the built wheel, and what the tests need: what is tested is what is shipped

PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11,\
	$(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)) python3)
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export PIP_ROOT_USER_ACTION := ignore
# A PYTHONPATH from outside could put another duly before the one meant.
unexport PYTHONPATH

VENV := .venv
TEST := .venv-test
# Tests mostly wait, for disks, servers and processes: with one more at once than there are cores they
# took 15 minutes, with as many as cores 23. A file is one worker's, in the order of files: the two
# long ones come first. ARGS="-n 0" runs all in one process.
WORKERS := $(shell $(PYTHON) -c "import os; print(min(4, (os.cpu_count() or 1) + 1))")
AT_ONCE := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# A wait that was too short for a busy machine has found nothing: it is told, and tried once more.
# Whatever else fails has failed.
PATIENT := -raR --reruns 1 \
	--only-rerun "s still not: " --only-rerun TimeoutError --only-rerun TimeoutExpired
CODE := $(wildcard src tests examples benchmarks docs/outside.py)
# Directories too: their times change when a file is deleted.
SHIPPED := $(shell find src -name __pycache__ -prune -o -print) pyproject.toml README.md LICENSE

# What it says about its own future is nothing for this build.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs

.DEFAULT_GOAL := help
.PHONY: help demo dev servers wheel test long check docs fix bench chaos cluster versions power-loss guarantees clean
.DELETE_ON_ERROR:

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r target text; do \
		printf '%-16s %s\n' "$$target" "$$text"; done

demo: $(VENV)/.runtime ## watch the three guarantees hold while workers are killed (ARGS="--kills 50")
	@$(VENV)/bin/duly demo $(ARGS)

dev: $(VENV)/.dev ## set up .venv for development

servers: ## install the servers that tests start for themselves (PostgreSQL, PgBouncer, RabbitMQ, Kafka)
	@tests/servers/install

wheel: dist/.built ## build the wheel

test: $(TEST)/.wheel ## test the built wheel (ARGS="-k outbox")
	@DULY_TEST_INSTALLED=1 $(TEST)/bin/python -m pytest $(AT_ONCE) $(PATIENT) $(ARGS)

long: $(VENV)/.dev ## the tests that make test leaves out: RabbitMQ nodes killed, restarted, full, by TLS; most of Kafka (half an hour)
	@DULY_TEST_LONG=1 $(VENV)/bin/python -m pytest -m long $(ARGS) tests/rabbitmq tests/kafka tests/chaos

check: $(VENV)/.dev ## lint, format, types (mypy, pyright), the direction of imports, the site
	$(VENV)/bin/ruff check $(CODE)
	$(VENV)/bin/ruff format --check $(CODE)
	$(VENV)/bin/mypy $(CODE)
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python $(CODE)
	$(VENV)/bin/lint-imports --no-cache
	@site=$$(mktemp -d) && trap 'rm -rf "$$site"' EXIT && \
		echo "mkdocs build --strict" && $(MKDOCS) build --strict --quiet --site-dir "$$site"

docs: $(VENV)/.dev ## serve the documentation as a site (ARGS="--dev-addr 127.0.0.1:8001")
	@$(MKDOCS) serve $(ARGS)

fix: $(VENV)/.dev ## fix what ruff can fix, and format
	$(VENV)/bin/ruff check --fix $(CODE)
	$(VENV)/bin/ruff format $(CODE)

bench: $(VENV)/.dev ## measure the speed, into benchmarks/RESULTS.md (ARGS="--on postgres": RESULTS_POSTGRES.md)
	$(if $(findstring kafka,$(ARGS)),@$(VENV)/bin/python benchmarks/apart.py quixstreams)
	@$(VENV)/bin/python benchmarks/run.py $(ARGS)

# A driver is needed for a server only; the development environment has it.
chaos: $(VENV)/$(if $(filter postgres% rabbitmq kafka,$(broker) $(store)),.dev,.runtime) ## kill, stop and starve real processes and judge what they did (minutes=10 seed=3 broker=postgres store=sqlite)
	@$(VENV)/bin/python -m duly.testing.chaos --minutes $(or $(minutes),1) $(if $(seed),--seed $(seed)) \
		$(if $(broker),--broker $(broker)) $(if $(store),--store $(store)) $(ARGS)

# Of each series one that its builders have, in which duly is seen to work.
VERSIONS := 14.18.0 16.10.0 17.6.0 18.1.0

versions: $(VENV)/.dev ## what concerns PostgreSQL, on other versions of it (VERSIONS=14.18.0)
	@for version in $(VERSIONS); do \
		programs=$$(tests/servers/postgres-version $$version) && echo "PostgreSQL $$version" && \
		export DULY_TEST_POSTGRES_PROGRAMS=$$programs && \
		$(VENV)/bin/python -m pytest $(AT_ONCE) $(ARGS) tests/postgres && \
		$(VENV)/bin/python -m pytest $(AT_ONCE) $(ARGS) tests/contract -k postgres || exit 1; done

cluster: $(VENV)/.dev ## three nodes of RabbitMQ, and three of Kafka, that lose one, and another (ten minutes)
	@DULY_TEST_CLUSTER=1 $(VENV)/bin/python -m pytest -rP -q tests/rabbitmq/test_cluster.py \
		tests/kafka/test_cluster.py $(ARGS)

power-loss: $(VENV)/.dev ## open many images of a lost disk with duly (images=2100 seed=1)
	@DULY_POWER_LOSS_IMAGES=$(or $(images),2100) DULY_POWER_LOSS_SEED=$(or $(seed),1) \
		DULY_POWER_LOSS_SAVE=docs/internals/shown/power_loss.json \
		$(VENV)/bin/python -m pytest -q tests/faults/power_loss

guarantees: $(VENV)/.dev ## write docs/guarantees.md from runs (long=1, postgres=4000: also the long ones again)
	@$(VENV)/bin/python -m tests.proof.table $(if $(long),--long) $(if $(postgres),--postgres $(postgres))

clean: ## remove environments, builds and caches
	rm -rf $(VENV) $(TEST) dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

# --- set-up ---------------------------------------------------------------------------------------

define venv
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
		"duly needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	@test -x $(1)/bin/python && $(1)/bin/python -m pip --version >/dev/null 2>&1 || { \
		echo "setting up $(1) ..."; rm -rf $(1); $(PYTHON) -m venv $(1); }
endef

# The bundled pip of Python 3.11 does not know dependency groups.
define with-groups
	@$(1)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
endef

# The demo needs duly and what it needs, no tools.
$(VENV)/.runtime: pyproject.toml
	$(call venv,$(VENV))
	@$(VENV)/bin/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml
	$(call venv,$(VENV))
	$(call with-groups,$(VENV))
	@$(VENV)/bin/python -m pip install --quiet --editable . --group dev
	@touch $(VENV)/.runtime $@

$(TEST)/.ready: pyproject.toml
	$(call venv,$(TEST))
	$(call with-groups,$(TEST))
	@$(TEST)/bin/python -m pip install --quiet build --group test
	@touch $@

# The wheel is built from the sdist, so that both are proven complete.
dist/.built: $(SHIPPED) | $(TEST)/.ready
	@rm -rf dist
	@$(TEST)/bin/python -m build --outdir dist . >build.log 2>&1 || { cat build.log; rm -f build.log; exit 1; }
	@rm -f build.log
	@touch $@

# Uninstalled first: pip leaves a package of the same version as it is.
$(TEST)/.wheel: dist/.built $(TEST)/.ready
	@$(TEST)/bin/python -m pip uninstall --quiet --yes duly 2>/dev/null
	@$(TEST)/bin/python -m pip install --quiet dist/*.whl
	@touch $@
