PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: venv demo test test-slow lint clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[geo,arrays,tables,remote,gcs,hub,deepspeed,dev]'
	touch $@

demo: venv
	$(BIN)/swath demo --out out/demo

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright
	$(BIN)/python tests/tools_saw_files.py

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile

test-slow: venv
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf .venv out build *.egg-info
