# Every target makes .venv first if it is missing. PYTHON=python3.12 make install chooses another interpreter.
PYTHON ?= python3
BIN := .venv/bin

# Processes that share the tests: 1 on a small GPU, where they share its memory too.
WORKERS ?= 2

# In the order of what rests on what: compile reports, ceilings, kernels, the whole step, the images.
.NOTPARALLEL:
BENCHES := compile ceilings kernels attention step data

.PHONY: install demo test lint format bench $(BENCHES:%=bench-%) clean

install: .venv/installed

.venv/installed: setup.py constraints.txt $(wildcard fastdino/data/views/fast*.[ch])
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	touch $@

demo: install
	$(BIN)/fastdino demo

# A file stays in one process: its fixtures and ranks are started once. The order of files is tests/conftest.py's.
test: install
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Each bench-NAME stands alone and writes its own result file; make -k bench goes on after one that fails.
bench: $(BENCHES:%=bench-%)
	$(BIN)/python -m bench.report

bench-ceilings bench-attention: room := kernels.
$(BENCHES:%=bench-%): bench-%: install
	$(BIN)/python -m bench.$(room)$*

clean:
	rm -rf .venv build dist *.egg-info runs
