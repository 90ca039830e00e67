# fluxmesh: from a fresh clone,
#
#   make demo      set up .venv, then paint a picture (no download of weights)
#   make test      unit, numerics and integration tests, and a sample of faults
#   make faults    every process killed and stopped at every moment: Linux, as root, 30 to 60 minutes
#   make chaos     JOBS=300 jobs with a random fault each, SEED=1, on HOSTS=3, FAMILY=flux1
#   make emulate   plans held against steps on slow links: Linux, as root, 2 or 3 minutes
#   make learn     the embedded checkpoint is taught a robot: a minute or two of training
#   make lint      ruff and mypy          } these two install
#   make parity    against diffusers      } torch and diffusers
#   make gpu       kernels against the plain forms, on a machine with a GPU
#   make ssh       a mesh through a real sshd: Linux, as root, with openssh-server installed
#   make page      the page of 'fluxmesh serve' in a real Chromium, which must be installed
#   make wheel     the wheel in an empty environment, by pip, uv and pipx, which it fetches
#   make mac       the tests once more, on Linux, with what differs on a Mac emulated
#   make house     which folder imports which
#
# EXTRA=cpu|cuda|none overrides which MLX is installed, PYTHON which interpreter makes .venv,
# WORKERS how many tests run at once (half the cores, at least 3).

.DEFAULT_GOAL := help
.PHONY: help demo test mac house learn faults chaos emulate lint parity gpu ssh page wheel format clean

VENV := .venv
BIN := $(VENV)/bin

# macOS: MLX's own wheel runs on Metal. Linux: CUDA 13 where the driver has it (580 and newer).
ifeq ($(shell uname -s),Darwin)
EXTRA ?= none
else ifneq ($(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null \
	| head -n 1 | awk -F. '$$1 >= 580'),)
EXTRA ?= cuda
else
EXTRA ?= cpu
endif

comma := ,
MLX := $(filter-out none,$(EXTRA))
extras = $(if $(strip $(MLX)$(1)),[$(MLX)$(if $(MLX),$(if $(1),$(comma)))$(1)])

# The first Python that runs and is new enough.
find_python = for python in $(PYTHON) python3 python3.13 python3.12 python3.11 python3.14; do \
	if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	echo $$python; exit; fi; done

help:
	@sed -n '3,16s/^# \{0,1\}//p' Makefile

$(BIN)/python:
	@python="$$($(find_python))"; \
	if [ -z "$$python" ]; then \
		echo "fluxmesh needs Python 3.11 or newer: 'brew install python@3.13' on macOS," \
			"or name one with PYTHON=/path/to/python3." >&2; exit 1; fi; \
	echo "Making $(VENV) with $$($$python --version)"; \
	$$python -m venv $(VENV) || { rm -rf $(VENV); \
		echo "Could not make $(VENV): on Debian and Ubuntu, 'apt install python3-venv'." >&2; \
		exit 1; }

# Installs this checkout with extras $(1), and shows Python the .pth file that leads to it: macOS
# hides files in the folders that iCloud keeps, and Python skips a .pth file that is hidden.
ifeq ($(shell uname -s),Darwin)
show_pth := chflags nohidden $(VENV)/lib/python*/site-packages/*.pth
else
show_pth := true
endif
install = $(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".$(1)" && $(show_pth)

# Each stamp is one set of extras, installed; a change of pyproject.toml installs anew.
$(VENV)/.run: $(BIN)/python pyproject.toml
	@echo "Installing fluxmesh$(call extras) (the first time takes a minute)"
	@$(call install,$(call extras))
	@touch $@

$(VENV)/.test: $(VENV)/.run
	@$(call install,$(call extras,test))
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	@echo "Installing the checkers and the oracles (torch, diffusers, transformers)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@$(call install,$(call extras,dev))
	@touch $@

DEMO_PROMPT := a red apple to the left of a dog on a yellow background

demo: $(VENV)/.run
	@$(BIN)/fluxmesh generate "$(DEMO_PROMPT)" --model tiny --seed 7 --output "$(CURDIR)"
	@echo "That was the embedded checkpoint, 'tiny'. Your own words:"
	@echo "  $(BIN)/fluxmesh generate 'two dogs on a blue background'"

# Most tests wait for processes: a few at once, also on two cores. Those that hold a time of
# milliseconds against a limit have the machine to themselves; their files alone are read for them.
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
WORKERS ?= $(shell n=$$(($(CORES) / 2)); [ $$n -gt 3 ] && echo $$n || echo 3)

test: $(VENV)/.test
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not alone"
	@$(BIN)/python -m pytest -m alone \
		$$(grep -rl --include='*.py' 'mark\.alone' tests/unit tests/numerics tests/integration tests/parallel tests/faults)

# Which of a Mac's ways: tests/as_on_a_mac/as_on_a_mac.py has their names.
mac:
	@EMULATE="$${EMULATE:-mac}" $(MAKE) --no-print-directory test

house: $(VENV)/.run
	@$(BIN)/python -m tools.house

learn: $(VENV)/.test
	@$(BIN)/python -m pytest tests/learn

# Those that wait for deadlines run a few at once, each on a mesh of its own; those that measure, or
# share a network, alone.
FAULTS := deaths hangs coordinator interrupts
ALONE := namespaces long_life

# FAMILY=flux1 or flux2 leaves the other's models out; chaos takes flux1's, or MODEL=a model.
of_family = $(if $(FAMILY),--family $(FAMILY))
of_model = $(if $(MODEL),--model $(MODEL),$(of_family))

faults: $(VENV)/.test
	@failed=0; \
	$(BIN)/python -m pytest --faults all -n $(WORKERS) --dist worksteal \
		$(of_family) $(FAULTS:%=tests/faults/test_%.py) || failed=1; \
	$(BIN)/python -m pytest --faults all $(of_family) \
		$(ALONE:%=tests/faults/test_%.py) || failed=1; \
	exit $$failed

JOBS ?= 300
SEED ?= 1
HOSTS ?= 3

chaos: $(VENV)/.test
	@$(BIN)/python -m tools.chaos --jobs $(JOBS) --seed $(SEED) --hosts $(HOSTS) $(of_model)

# Hosts that compute by waiting, in network namespaces joined by limited links.
emulate: $(VENV)/.test
	@$(BIN)/python -m benchmarks.emulated

lint: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

parity: $(VENV)/.dev
	@$(BIN)/python -m pytest tests/parity

# On a machine with a GPU that MLX computes on.
gpu: $(VENV)/.test
	@$(BIN)/python -m pytest tests/gpu

ssh: $(VENV)/.test
	@$(BIN)/python -m pytest tests/ssh

page: $(VENV)/.dev
	@$(BIN)/python -m pytest tests/page

wheel: $(VENV)/.test
	@$(BIN)/python -m pytest tests/install

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis
