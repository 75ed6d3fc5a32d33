# `make run` and `make test` work in a fresh clone: they make .venv themselves. Stamp files in it
# skip the set-up while pyproject.toml and requirements.lock stay as they are.

SHELL := /bin/sh
VENV := .venv
# The first of these that is Python 3.11 or newer; `make PYTHON=...` takes another.
PYTHON := python3.11 python3
# Twice quiet: pip then says nothing but errors.
PIP := $(VENV)/bin/python -m pip -qq --disable-pip-version-check
INSTALL := $(PIP) install -c requirements.lock

.PHONY: help run test lint format benchmark lock clean
.DELETE_ON_ERROR:

help:
	@echo "make run        run the lynx_hare experiment and write its report"
	@echo "make test       run the tests"
	@echo "make lint       check style and types"
	@echo "make format     rewrite the sources in the project's style"
	@echo "make benchmark  run the benchmarks against sbi"
	@echo "make lock       rewrite requirements.lock, keeping versions that still fit;"
	@echo "                with UPGRADE=1 take the newest of everything"
	@echo "make clean      remove .venv and caches"

run: $(VENV)/.runtime
	$(VENV)/bin/sbi-dist run lynx_hare

test: $(VENV)/.test $(VENV)/.policy
	@# A process for each core: threads of their own would only wait for each other.
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/unit tests/manifests -n auto
	@# Whole files, two at a time, as each starts servers or a Ray of its own. Those of the services
	@# come first: they must not find themselves connected to the Ray that those after them share.
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/services tests/ray tests/gpu \
	    -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.test
	$(VENV)/bin/ruff check sbi_dist tests jobs cluster k8s
	$(VENV)/bin/ruff format --check sbi_dist tests jobs cluster k8s
	$(VENV)/bin/mypy

format: $(VENV)/.test
	$(VENV)/bin/ruff check --fix sbi_dist tests jobs cluster k8s
	$(VENV)/bin/ruff format sbi_dist tests jobs cluster k8s

benchmark: $(VENV)/.benchmark
	$(VENV)/bin/python -m tests.benchmarks

# Ray can't start workers with an interpreter whose path has a space in it: they hang.
$(VENV)/.created:
	@case "$$(pwd)" in *[[:space:]]*) \
	    echo "make: Ray needs a path without spaces; move the checkout out of: $$(pwd)" >&2; exit 1;; \
	esac; \
	for python in $(PYTHON); do \
	    if "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
	            2>/dev/null; then \
	        "$$python" -m venv --clear $(VENV) && touch $@ && exit; \
	        exit 1; \
	    fi; \
	done; \
	echo "make: needs Python 3.11 or newer with its venv module; tried: $(PYTHON)." >&2; \
	echo "make: name another one with: make PYTHON=/path/to/python3" >&2; \
	exit 1

# By itself and first: by far the largest download, and every other version has to fit it.
$(VENV)/.torch: $(VENV)/.created pyproject.toml requirements.lock
	@echo "Installing torch into $(VENV); this takes some minutes the first time."
	@$(INSTALL) torch
	@touch $@

$(VENV)/.runtime: $(VENV)/.torch
	@echo "Installing sbi_dist and what it needs into $(VENV); this can take some minutes."
	@$(INSTALL) -e .
	@touch $@

# An extra brings the runtime dependencies too.
$(VENV)/.test $(VENV)/.benchmark: $(VENV)/.%: $(VENV)/.torch
	@echo "Installing sbi_dist with its '$*' extra into $(VENV); this can take some minutes."
	@$(INSTALL) -e '.[$*]'
	@# Its reference posteriors are read as data; what it depends on is not needed for that.
	@$(INSTALL) --no-deps sbibm==1.1.0
	@touch $@ $(VENV)/.runtime

# The policy linter of the Kubernetes manifests. Alone, as it does not fit the project's versions.
$(VENV)/.policy: $(VENV)/.created tests/manifests/policy.lock
	@echo "Installing checkov into $(VENV)/policy; this takes half a minute."
	@$(VENV)/bin/python -m venv --clear $(VENV)/policy
	@$(VENV)/policy/bin/python -m pip -qq --disable-pip-version-check install \
	    -r tests/manifests/policy.lock
	@touch $@

# A local version (torch's +cpu) is dropped: which build of a version is installed differs by
# machine. The file is left alone when nothing changed, so that no set-up runs again.
lock: $(VENV)/.created
	@echo "Resolving all extras in a temporary environment; this takes some minutes."
	@set -e; dir=$$(mktemp -d); trap 'rm -rf "$$dir"' EXIT; \
	keep=; if [ -z "$(UPGRADE)" ] && [ -s requirements.lock ]; then keep="-c requirements.lock"; fi; \
	$(VENV)/bin/python -m venv "$$dir/venv"; \
	pip() { "$$dir/venv/bin/python" -m pip -qq --disable-pip-version-check "$$@"; }; \
	pip install $$keep '.[test,benchmark]'; \
	pip check; \
	pip install $$keep --no-deps sbibm==1.1.0; \
	pip freeze --exclude sbi_dist > "$$dir/frozen"; \
	{ \
	    echo "# The exact version of every dependency, all extras included, for pip's -c option."; \
	    echo "# Made by 'make lock', which installs them in a fresh environment. Do not edit."; \
	    sed 's/+[^ ]*$$//' "$$dir/frozen"; \
	} > "$$dir/lock"; \
	if cmp -s "$$dir/lock" requirements.lock; then echo "requirements.lock is up to date."; \
	else cp "$$dir/lock" requirements.lock; echo "requirements.lock is rewritten."; fi

clean:
	rm -rf $(VENV) .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find sbi_dist tests jobs -name __pycache__ -type d -prune -exec rm -rf {} +
