# Two commands matter: `make demo` and `make test`. Both need Python >= 3.10, make, and g++ for the C++ extension.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch is pinned here and installed first: an unpinned one brings gigabytes of CUDA.
TORCH := torch==2.13.0
# From the repository's root `import kernels` would find this project's folder and not the package of that name.
export PYTHONSAFEPATH := 1
# Files of tests run side by side, a process a core, so that each process computes on one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile

# What the bundled models were trained on, and mutational scans to judge them by.
DATA ?= ../shared/data/sequences/swissprot201401_nr60k_le1022.fasta.gz
DMS ?= $(wildcard ../shared/data/dms)

# Sequences of `make million`.
COUNT ?= 1000000

.PHONY: demo family million test lint types unit wheel clean

$(BIN)/protnest: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/test: $(BIN)/protnest pyproject.toml
	$(BIN)/pip install --quiet --editable '.[test]'
	@touch $@

demo: $(BIN)/protnest
	rm -rf out/demo out/demo-nested
	$(BIN)/protnest embed examples/proteins.fasta --out out/demo
	$(BIN)/protnest embed examples/proteins.fasta --out out/demo-nested --chain nano
	$(BIN)/protnest score --wt examples/proteins.fasta --target 'tr|F7I569|F7I569_CALJA' --all-singles --model nano-m --out out/demo/scores.csv
	$(BIN)/protnest generate -n 5 --max-residues 120 --out out/demo/designs.fasta

family: $(BIN)/protnest
	$(BIN)/protnest train-family $(DATA) --out out/family $(if $(DMS),--dms $(DMS))

# About two hours on two cores; stopped or killed, the same command goes on. Exit code 1 where memory or time grow.
million: $(BIN)/protnest
	$(BIN)/python -m protnest.benchmarks.million $(DATA) --out out/million-$(COUNT) --count $(COUNT) --workers 2 --check

# Kernels for GPUs run in Triton's interpreter, in a process of their own.
define suite
	$(SUITE) -m 'not slow'
	TRITON_INTERPRET=1 $(SUITE) -m 'gpu and not slow' tests/kernels
endef

test: lint types wheel

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not follow editable installs of namespace packages, so it reads the folders through links.
types: $(VENV)/test
	mkdir -p .typecheck/protnest
	for folder in engine kernels training benchmarks; do ln -sfn ../../$$folder .typecheck/protnest/$$folder; done
	MYPYPATH=.typecheck $(BIN)/mypy -p protnest

# The suite on the checkout, for whoever works on it.
unit: SUITE := $(PYTEST)
unit: $(VENV)/test
	$(suite)

# What users install is what was tested: the suite on the wheel's files.
wheel: SUITE := PROTNEST_WHEEL=$(CURDIR)/build/wheel PYTHONPATH=$(CURDIR)/build/wheel $(PYTEST)
wheel: $(VENV)/test
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist .
	$(BIN)/pip install --quiet --no-deps --target build/wheel dist/*.whl
	$(suite)

clean:
	rm -rf build dist out .typecheck *.egg-info
