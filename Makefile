# make demo and make test set up everything they need in .venv; nothing else is touched.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := runs/demo

# Memory stays in huge pages and is not given back after every step (README, "Install").
KEEP_PAGES := glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=4000000000:glibc.malloc.top_pad=200000000
# Less time in the compiler: a small model takes longer to compile than to run, and two concepts share their programs.
FAST := GLIBC_TUNABLES=$(KEEP_PAGES) JAX_COMPILATION_CACHE_DIR=$(RUN)/compiled \
	XLA_FLAGS="$(XLA_FLAGS) --xla_backend_optimization_level=1"

.PHONY: demo test test-fast parity gpu-check lint format clean

# First the shipped models' pictures, then what a short training makes.
demo: $(VENV)/.installed
	rm -rf $(RUN)/shipped $(RUN)/report
	$(FAST) $(BIN)/mergevq reconstruct mini_scenes/pictures --out $(RUN)/shipped/reconstructions
	$(FAST) $(BIN)/mergevq sample --model tiny-mergear --num 48 --batch-size 48 --keep 144 --cfg-scale 3.5 \
		--show-cache --out $(RUN)/shipped/samples
	$(FAST) $(BIN)/tokenverse generate --prompt "a star and a heart on the beach" --compare each \
		--concept "a star=tiny-star" --concept "a heart=tiny-heart" --out $(RUN)/shipped/tokenverse
	@echo "The shipped models' pictures are in $(RUN)/shipped: reconstructions, samples/samples.png, samples/cache.png,"
	@echo "and tokenverse/overview.png, with concepts that were learned from one picture each. Now the same is trained:"
	@echo "a tokenizer for a few minutes, and the concepts of two pictures."
	$(BIN)/mergevq scenes --data-dir data
	$(FAST) $(BIN)/mergevq train --config configs/mergevq_tiny.py:demo --workdir $(RUN)
	$(FAST) $(BIN)/mergevq evaluate reconstruction --tokenizer tiny --tokenizer $(RUN)/tokenizer \
		--metrics $(RUN)/metrics.jsonl --out $(RUN)/report
	$(FAST) $(BIN)/tokenverse learn --config configs/tokenverse_tiny.py:all --workdir $(RUN)/concepts \
		--config.cache=$(RUN)/pool
	$(FAST) $(BIN)/tokenverse generate --prompt "a star and a heart on the beach" --compare each \
		--concept "a star=$(RUN)/concepts/star.safetensors" --concept "a heart=$(RUN)/concepts/heart.safetensors" \
		--out $(RUN)/tokenverse
	@echo "Look at $(RUN)/shipped, at reconstructions.png, loss.png and summary.md in $(RUN)/report, and at"
	@echo "$(RUN)/tokenverse/overview.png"

# One worker a core, up to four: a worker needs some gigabytes. Neighbours share what they compile: work moves only to idle workers.
test: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# Those that train nothing and run no command whole: a minute or so, for who changes a function.
test-fast: $(VENV)/.installed
	$(BIN)/python -m pytest tests/unit --numprocesses auto --maxprocesses 4 --dist worksteal

# Against diffusers, transformers and reference metrics, which need PyTorch: here its build for CPUs, where that can be had.
parity: $(VENV)-parity/.installed
	$(VENV)-parity/bin/python -m pytest tests/parity

# The benchmarks on a GPU (pip install -e '.[gpu]' in VENV); no section begins after six minutes. PyTorch with CUDA adds its peer.
gpu-check: $(VENV)/.installed
	XLA_PYTHON_CLIENT_PREALLOCATE=false $(BIN)/python benchmarks/gpu_check.py --out gpu_check.json

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

$(VENV)-parity/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-parity
	-$(VENV)-parity/bin/python -m pip install --quiet --retries 0 --no-deps --constraint constraints.txt \
		--index-url https://download.pytorch.org/whl/cpu torch torchvision
	$(VENV)-parity/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test,parity]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-parity .cache .pytest_cache runs
