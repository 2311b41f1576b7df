# People and CI run the same commands.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
COMPILED := $(VENV)/.compiled
GENERATED := helios/v1

.PHONY: setup run test lint format protos check-protos docs clean

setup: $(STAMP) $(COMPILED)

# torch is installed first and alone, so that pip takes its pinned CPU build if an index has one.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[engine,local,training,dev]'
	touch $(STAMP)

# Compiles the CPU's kernels, so that the first start need not wait for them. Code that was compiled from the same
# sources is reused. So after a change of other files this takes only a few seconds.
$(COMPILED): $(STAMP) $(wildcard helios/*.py helios/engine/*.py helios/engine/*/*.py helios/engine/*/*/*.py)
	$(BIN)/python -m helios.engine.precompile
	touch $(COMPILED)

run: setup
	$(BIN)/helios up

# The linters run while the kernels compile. Then the tests run in one process per core.
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

# Checks that the checked-in stubs are those that the protos generate.
check-protos: $(STAMP)
	rm -rf $(VENV)/protos && mkdir -p $(VENV)/protos
	$(BIN)/python -m grpc_tools.protoc -Iprotos --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
	  --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  --python_out=$(VENV)/protos --grpc_python_out=$(VENV)/protos \
	  --mypy_out=$(VENV)/protos --mypy_grpc_out=$(VENV)/protos protos/helios/v1/*.proto
	diff -r --exclude=__init__.py --exclude=__pycache__ $(VENV)/protos/helios/v1 $(GENERATED)

# Writes the tables of docs/settings.md from the settings classes.
docs: setup
	$(BIN)/python scripts/settings_reference.py

clean:
	rm -rf $(VENV) build *.egg-info
