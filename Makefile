# The two commands of the README, and what a contributor runs.
# Everything is installed into .venv of this checkout; PYTHON names the interpreter.

PYTHON ?= python3
BIN := .venv/bin
WORKDIR ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test check setup setup-dev clean

demo: setup
	$(BIN)/python train/main.py --workdir $(WORKDIR)

test: setup-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not study"

check: setup-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not study"

setup: .venv/.runtime

setup-dev: .venv/.dev

.venv/.runtime: requirements.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
		{ rm -rf .venv; echo "error: no virtual environment; on Debian: apt install python3-venv"; exit 1; }
	$(PIP) -r requirements.txt
	@touch $@

# torchvision declares a torch build of its own; its pure-Python part, which is all that
# transformers' processors need, works beside any once it does not register compiled operators.
NO_OPERATORS := import sys, types; sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))

.venv/.dev: requirements-dev.txt .venv/.runtime
	$(PIP) -r requirements-dev.txt
	$(PIP) --no-deps torchvision==0.28.0
	@$(BIN)/python -c "import torchvision" 2>/dev/null || echo '$(NO_OPERATORS)' > \
		"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchvision_without_operators.pth"
	@touch $@

clean:
	rm -rf .venv runs data
