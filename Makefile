# Two commands do everything from a fresh clone: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help quickstart test lint format docs linkcheck clean
help:
	@echo "make quickstart   train on real data with WSD-S and EMA, print a table, write a picture"
	@echo "make test         run the whole suite"
	@echo "make lint         ruff, mypy --strict, import-linter"
	@echo "make docs         build the HTML documentation into docs/_build/html"
	@echo "make linkcheck    look whether the links out of it are still good; needs a network"
	@echo "make bench-NAME   run benchmarks/NAME.py (wsd, ema, balanced_ema, sharpness_cost, sharpness_effect,"
	@echo "                  gradient_stabilisers, gradient_overhead, stability_report, stability_gap, evaluation_cost, co2_overlap,"
	@echo "                  co2_quality, time_to_loss, co2_memory, compression, robustness,"
	@echo "                  simulation_cost, lowbit_stability, float8_gpu, peft_init_cost,"
	@echo "                  peft_convergence, import_time)"

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: $(INSTALLED)
	$(BIN)/lightning-stable run quickstart

# One thread each. The processes of one test talk to each other, so each worker has its own pair.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

# Not part of .ci/run, which has no network.
linkcheck: $(INSTALLED)
	$(BIN)/python -m sphinx -q -b linkcheck docs docs/_build/linkcheck

bench-%: $(INSTALLED)
	$(BIN)/python benchmarks/$*.py

clean:
	rm -rf $(VENV) build dist docs/_build runs
