# `make demo` and `make test` are all the set-up there is: both create .venv and install into it first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test check train bench gpu-bench clean

help:
	@echo "make demo    accelerate a trained spiking ResNet on real data; results also in out/"
	@echo "make test    run the whole test suite (ARGS='-k name' narrows it)"
	@echo "make check   formatting, lint, types, import rules and the test suite"
	@echo "make train   train the demo's network again (CPU, about 15 minutes)"
	@echo "make bench   run the benchmark suites; results in out/bench (ARGS=--quick ends within a minute)"
	@echo "make gpu-bench   all GPU tests and measurements in one call, under nine minutes; results in out/gpu"
	@echo "make clean   remove .venv, build products and out/"

install: $(INSTALLED)

# An editable install carries no native engine: it is compiled at first use (here, by `env`) and again after every change
# of its sources, which a library inside src/ would hide.
$(INSTALLED): requirements-dev.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed; name one with PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	SPARSEFLOW_NATIVE=0 $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	$(BIN)/python -m sparseflow env
	touch $@

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(ARGS)

check:
	.ci/run

train: $(INSTALLED)
	cd examples && ../$(BIN)/python -m digits.train $(ARGS)

bench: $(INSTALLED)
	$(BIN)/python -m sparseflow bench $(ARGS)

gpu-bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu --out out/gpu $(ARGS)

clean:
	rm -rf $(VENV) build out src/*.egg-info
