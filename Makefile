# Everything runs in .venv, which is made on first use with the versions of constraints.txt. The oldest supported
# versions are tested by `make test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt`.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
EXTRAS ?= dev
INTEGRATIONS := $(VENV)/.integrations
DOCS := $(VENV)/.docs
NATIVE := $(shell find csrc -type f)

.PHONY: install demo test test-all sanitize fuzz lint format docs bench clean help

help:
	@echo "make demo      train a small ResNet on digits with RMSGD, SGD and SAM: table, JSON and plots"
	@echo "make test      the test suite          make test-all  the slow tests and trainers too"
	@echo "make sanitize  the compiled core under AddressSanitizer, UBSan and ThreadSanitizer"
	@echo "make fuzz      random hostile spectra, weights, states and files; SECONDS=60 each"
	@echo "make lint      ruff, mypy, clang-format    make format    apply them"
	@echo "make docs      the documentation, into site/; a broken link is an error"
	@echo "make bench     measure speed on this machine (tens of minutes) and rewrite the tables of docs/ and README"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The installation is editable: a change in Python needs no reinstall, and a change under csrc/ rebuilds the core.
$(STAMP): $(BIN)/python pyproject.toml setup.py $(CONSTRAINTS) $(NATIVE)
	$(PIP) install -q -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	@touch $@

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m bench train --out .out/demo

# Two processes of one thread: most of the suite's time is single-threaded.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# The trainers of rmsgd.integrations take 300 MB, which the other tests do without. CI asks for them by EXTRAS.
# Nothing is built again: only the packages that the extra names are added.
$(INTEGRATIONS): $(STAMP)
	$(PIP) install -q -c $(CONSTRAINTS) 'rmsgd-kernels[integrations]'
	@touch $@

$(DOCS): $(STAMP)
	$(PIP) install -q -c $(CONSTRAINTS) 'rmsgd-kernels[docs]'
	@touch $@

test-all: $(INTEGRATIONS)
	$(BIN)/python -m pytest -m 'slow or not slow'

sanitize: $(STAMP)
	$(BIN)/python tests/sanitize.py

# SECONDS for each of five targets: spectra and weights against the reference, mangled state dicts, damaged
# checkpoint files, and the C++ headers under libFuzzer (where there is a clang).
fuzz: SECONDS := 60
fuzz: $(STAMP)
	cd tests && ../$(BIN)/python -m fuzz --seconds $(SECONDS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -type f | xargs $(BIN)/clang-format --dry-run -Werror

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -type f | xargs $(BIN)/clang-format -i

docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(STAMP)
	$(BIN)/python -m bench speed --out bench/results --readme docs/benchmarks.md
	$(BIN)/python -m bench epoch-time --optimizers rmsgd,sgd,sam --rounds 10 --out bench/results --readme docs/benchmarks.md
	$(BIN)/python -m bench split --out bench/results --readme docs/benchmarks.md
	$(BIN)/python -m bench probe-speed --out bench/results --readme docs/benchmarks.md
	$(BIN)/python -m bench probe-speed --large --out bench/results --readme docs/benchmarks.md
	$(BIN)/python -m bench noise-search --out bench/results --readme docs/benchmarks.md
	$(BIN)/python -m bench gate --update
	$(BIN)/python -m bench gate --self-test 10 --out bench/results --readme docs/benchmarks.md
	$(BIN)/python -m bench tables README.md

clean:
	rm -rf build *.egg-info rmsgd/*.so site $(STAMP) $(INTEGRATIONS) $(DOCS)
