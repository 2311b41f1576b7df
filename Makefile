# Every command a person runs is the command CI runs.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
COMPILED := $(VENV)/.compiled
GENERATED := helios/v1

.PHONY: setup run test lint format protos check-protos docs clean

setup: $(STAMP) $(COMPILED)

# torch first and alone: its pinned CPU build is taken where pip finds one.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[engine,local,training,dev]'
	touch $(STAMP)

# Compiles the CPU's kernels, for which the first start would have to wait otherwise. What is compiled of the
# same sources is taken as it is, so files too many cost a few seconds.
$(COMPILED): $(STAMP) $(wildcard helios/*.py helios/engine/*.py helios/engine/*/*.py)
	$(BIN)/python -m helios.engine.precompile
	touch $(COMPILED)

run: setup
	$(BIN)/helios up

# What can run at once does: linters beside the compilation of kernels, then a process of tests on each core.
test: $(STAMP)
	$(MAKE) --jobs 2 --output-sync lint $(COMPILED)
	$(BIN)/pytest --numprocesses auto --dist worksteal

lint: $(STAMP) check-protos
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: setup
	rm -f $(GENERATED)/*_pb2*
	$(BIN)/python -m grpc_tools.protoc -Iprotos --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
	  --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  --python_out=. --grpc_python_out=. --mypy_out=. --mypy_grpc_out=. protos/helios/v1/*.proto

# The checked-in stubs are what the protos generate.
check-protos: $(STAMP)
	rm -rf $(VENV)/protos && mkdir -p $(VENV)/protos
	$(BIN)/python -m grpc_tools.protoc -Iprotos --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
	  --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  --python_out=$(VENV)/protos --grpc_python_out=$(VENV)/protos \
	  --mypy_out=$(VENV)/protos --mypy_grpc_out=$(VENV)/protos protos/helios/v1/*.proto
	diff -r --exclude=__init__.py --exclude=__pycache__ $(VENV)/protos/helios/v1 $(GENERATED)

# The tables of docs/settings.md, from the settings themselves.
docs: setup
	$(BIN)/python scripts/settings_reference.py

clean:
	rm -rf $(VENV) build *.egg-info
