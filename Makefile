# make demo and make test set up everything they need in .venv; nothing else is touched.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := runs/demo

# Less time in the compiler: a small model takes longer to compile than to run.
FAST_COMPILE := XLA_FLAGS="$(XLA_FLAGS) --xla_backend_optimization_level=1"

.PHONY: demo test lint format clean

demo: $(VENV)/.installed
	$(BIN)/mergevq scenes --data-dir data
	$(FAST_COMPILE) $(BIN)/mergevq train --config configs/mergevq_tiny.py:demo --workdir $(RUN)
	$(FAST_COMPILE) $(BIN)/mergevq evaluate --tokenizer tiny --tokenizer $(RUN)/tokenizer \
		--metrics $(RUN)/metrics.jsonl --out $(RUN)/report
	@echo "Look at $(RUN)/report/reconstructions.png, loss.png and summary.md"

# One worker a core, up to four: a worker needs some gigabytes. A file's tests share what they compile, so stay together.
test: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "Python 3.11 or later is needed; $(PYTHON) is older. Try: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,dev]'
	touch $@

clean:
	rm -rf $(VENV) .cache .pytest_cache runs
