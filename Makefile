# make demo     make data, train, evaluate, predict and report, in runs/demo
# make test     the gate: everything that a change must pass
# make check    the quick part of it: formatting, lint, types
# make format   mend formatting and lint
# make lock     pin the newest versions in requirements.txt
# make bench-gpu  on a machine with one GPU: fpn beside torchvision, in under 8 minutes; results in runs/bench-gpu.
#                 With PYTHON=python3 by that Python as it is, which must have what benchmarks/gpu.py names
# make clean    remove what the targets above made
#
# Each sets up .venv by itself the first time. PYTHON=python3.12 chooses the interpreter.

PYTHONS := $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.14 python)
BIN := .venv/bin
# The uv of .venv, where there is one, before the user's own.
UV := PATH="$(CURDIR)/$(BIN):$$PATH" uv

.PHONY: demo test check format lock bench-gpu clean

demo: .venv/installed
	$(BIN)/fpn demo --out runs/demo

test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --durations=15

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: .venv/installed
	$(UV) pip compile --quiet --upgrade --extra dev --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-annotate --custom-compile-command "make lock" -o requirements.txt pyproject.toml

bench-gpu: $(if $(PYTHON),,.venv/installed)
	PYTHONPATH=src $(or $(PYTHON),$(BIN)/python) benchmarks/gpu.py --out runs/bench-gpu

clean:
	rm -rf .venv runs dist build .pytest_cache .ruff_cache
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

.venv/installed: $(BIN)/python requirements.txt pyproject.toml
	$(UV) pip install --python $(BIN)/python --compile-bytecode --require-hashes -r requirements.txt
	$(UV) pip install --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

# Where there is no uv, pip fetches the pinned one.
$(BIN)/python:
	@for python in $(PYTHONS); do \
		"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
		python=; \
	done; \
	if [ -z "$$python" ]; then \
		echo "fpn needs Python 3.11 or newer, and none of these is that: $(PYTHONS)." >&2; \
		echo "Install one, or name it: make PYTHON=/path/to/python3" >&2; \
		exit 1; \
	fi; \
	echo "Setting up .venv with $$("$$python" --version)"; \
	rm -rf .venv; \
	if uv --version >/dev/null 2>&1; then \
		uv venv --quiet --python "$$python" .venv; \
	else \
		"$$python" -m venv .venv && \
		sed -n '/^uv==/,/[^\\]$$/p' requirements.txt >.venv/uv.txt && \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r .venv/uv.txt; \
	fi
