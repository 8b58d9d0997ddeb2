# Every target makes .venv first if it is missing. PYTHON=python3.12 make install chooses another interpreter.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test lint format bench clean

install: .venv/installed

.venv/installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	touch $@

demo: install
	$(BIN)/fastdino demo

test: install
	$(BIN)/pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python -m bench.kernels
	$(BIN)/python -m bench.step
	$(BIN)/python -m bench.report

clean:
	rm -rf .venv build dist *.egg-info runs
