# The two commands of the README, and what a contributor runs.
# Everything is installed into .venv of this checkout; PYTHON names the interpreter.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Python versions for which the tested versions of all packages are locked, with their hashes.
# Others, and `LOCKED=`, take the newest that the ranges of requirements*.txt allow.
LOCKED ?= 3.11 3.12 3.13
WORKDIR ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
# Processes that run tests, of up to 3 GB each.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test study test-newest test-pages check types fast scale docs lock setup setup-dev clean

demo: setup
	$(BIN)/python train/main.py --workdir $(WORKDIR)

test: setup-dev
	$(PYTEST) -m "not study"

# What takes minutes each: before a release, and after a change of what they hold.
study: setup-dev
	$(PYTEST) -m study

# The same tests on the newest versions that the ranges allow.
test-newest:
	$(MAKE) test VENV=.venv-newest LOCKED=

# The page of a run in Chromium without a window, also of 500 steps of 128 rollouts.
test-pages: setup-dev
	$(BIN)/python -m pytest -rs tests/unit/test_page_data.py tests/contracts/test_page.py

check: setup-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(MAKE) --jobs=2 types fast

# Both at once, for pyright has one thread.
types:
	$(BIN)/pyright

fast:
	$(PYTEST) -m "not slow and not study"

# What the recipe would cost on TPUs, compiled without one, in an environment of its own.
scale:
	$(MAKE) .venv-scale/.scale VENV=.venv-scale
	.venv-scale/bin/python benchmarks/scale.py $(SCALE)

# README.md and docs/ as a site, site/index.html, in an environment of its own. It opens from disk.
docs: .venv-docs/.docs
	@rm -rf build/docs site && mkdir -p build/docs
	@git ls-files '*.md' docs examples LICENSE | tar cf - -T - | tar xf - -C build/docs
	.venv-docs/bin/mkdocs build --quiet --strict
	@echo "the pages: $(CURDIR)/site/index.html"

.venv-docs/.docs: requirements-docs.txt
	@test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	@touch $@

$(VENV)/.scale: requirements.txt requirements-scale.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements-scale.txt
	@touch $@

setup: $(VENV)/.runtime

setup-dev: $(VENV)/.dev

# $(call install,NAME): the packages of NAME.lock where there is one for this Python.
install = if $(BIN)/python -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] not in "$(LOCKED)".split())'; \
	then $(PIP) --require-hashes -r $(1).lock; \
	else echo "note: no lock for this Python; newest versions of $(1).txt"; $(PIP) -r $(1).txt; fi

$(VENV)/.runtime: requirements.txt requirements.lock
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "error: no virtual environment; on Debian: apt install python3-venv"; exit 1; }
	@$(call install,requirements)
	@touch $@

# torchvision declares a torch build of its own; its pure-Python part, which is all that
# transformers' processors need, works beside any once it does not register compiled operators.
NO_OPERATORS := import sys, types; sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))

$(VENV)/.dev: requirements-dev.txt requirements-dev.lock requirements-torch.txt $(VENV)/.runtime
	@$(call install,requirements-dev)
	$(PIP) -r requirements-torch.txt
	$(PIP) --no-deps torchvision==0.28.0
	@$(BIN)/python -c "import torchvision" 2>/dev/null || echo '$(NO_OPERATORS)' > \
		"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchvision_without_operators.pth"
	@touch $@

# Writes the locks anew, versions kept where the ranges allow; UPGRADE=--upgrade takes the newest.
COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-annotate --no-emit-index-url --custom-compile-command "make lock" $(UPGRADE)

lock: setup-dev
	$(PIP) uv
	$(COMPILE) requirements.txt --output-file requirements.lock
	$(COMPILE) requirements-dev.txt --constraint requirements.lock --output-file requirements-dev.lock

clean:
	rm -rf .venv .venv-newest .venv-scale .venv-docs build site runs data
