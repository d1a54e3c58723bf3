# Everything runs in .venv, which the first target called creates. torch is pinned there because a plain `torch` may
# bring several GB of CUDA packages.
PYTHON ?= python3
PHOTO ?= examples/chelsea.jpg
BIN := .venv/bin

.PHONY: demo test test-sanitizers test-oldest gpu-check lint format bench gpu-e2e bench-report clean

demo: .venv/installed
	$(BIN)/hvprune info
	$(BIN)/hvprune demo $(PHOTO) --out demo.png

test: .venv/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not sanitizer"

# For changes of the CUDA kernels: emulated under AddressSanitizer and ThreadSanitizer, and without each of their barriers.
test-sanitizers: .venv/installed-test
	$(BIN)/python -m pytest -n auto -m sanitizer

# The oldest transformers that attach supports, in an environment of its own.
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest tests/test_attach.py tests/test_attach_next.py

# On a machine with an NVIDIA GPU, with the packages that $(PYTHON) has there.
gpu-check:
	$(PYTHON) tests/gpu_check.py

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*')

bench: .venv/installed-test
	$(BIN)/hvprune bench --csv

# Whole models with random weights on an NVIDIA GPU, in under ten minutes with the installation, from whatever Python has
# torch and transformers; nothing is downloaded. The time is not enough for every row of all three models: the most wanted
# come first, and PRESET=llava-next-7b KEEP=earlier/e2e.csv measures one model and writes it with the rows of another run.
# OUT=folder takes the files, by default benchmarks/results/<gpu>.
PRESET ?= all
gpu-e2e:
	HVPRUNE_CUDA=1 $(PYTHON) -m pip install --no-build-isolation --no-deps --editable .
	$(PYTHON) -m hvprune bench e2e --preset $(PRESET) --device cuda --time-limit 480 \
		$(if $(KEEP),--keep $(KEEP)) $(if $(OUT),--csv $(OUT)/e2e.csv)

bench-report: .venv/installed-test
	$(BIN)/hvprune bench plot
	$(BIN)/python -m hvprune.benchmarks.report

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info hvprune/*.so

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0

# Editable, so that changes to Python files count at once; changes to sources of the extension rebuild it.
NATIVE := setup.py pyproject.toml $(wildcard csrc/* csrc/*/*)

.venv/installed: .venv/bin/python $(NATIVE)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

.venv-oldest/installed: $(NATIVE)
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet torch==2.13.0 transformers==5.17.0
	.venv-oldest/bin/python -m pip install --quiet --editable '.[test]'
	touch $@
