# Everything works from a bare clone with Python >= 3.11 and make. `make help` lists the targets.
# PY=python3 uses an environment that is there already, in place of .venv (for example on a GPU node).
# WORKERS is the number of test processes: one more than the two cores of a small machine, since some wait (for Ray, a browser,
# a child); with a GPU it is 0 (one process), since timings need the GPU alone.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && command -v $$p && break; done)
VENV := .venv
PY ?= $(VENV)/bin/python
READY := $(if $(filter $(VENV)/bin/python,$(PY)),$(VENV)/.ready)
WORKERS ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo 0 || echo 3)
SUITE ?= all
LAB_SETTINGS := $(VENV)/share/jupyter/lab/settings
PYTEST = $(PY) -m pytest -n $(WORKERS) --dist worksteal
NBMAKE := --nbmake --nbmake-timeout=120
# Tests start many processes; without bytecode each of them would compile what it imports (torch: 9 s in place of 3).
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup cli lab test whole notebooks test-triton36 test-torch211 test-engines live fuzz lint html app pictures gpu sanitize record tuned configs clean

help:
	@echo 'make lab        JupyterLab on the notebooks (LAB_ARGS="--no-browser --port=8888")'
	@echo 'make cli        the shell alone, without torch or notebooks (85 MB): .cli/bin/moelab explain, shape, export, doctor'
	@echo 'make test       tests and notebooks, all that needs no GPU: $(LASTS) (ARGS="-k roofline" narrows them)'
	@echo 'make whole      all of what those tests sample, as CI runs it: 6 to 10 minutes more'
	@echo 'make test-triton36  the kernels under Triton 3.6.0, which configs and recordings are from: 90 s on two cores'
	@echo 'make test-torch211  the op, the transformers door and serving under the oldest torch, a CUDA build, on a CPU: 4.5 GB, then 2 minutes'
	@echo "make test-engines   the plugins under sglang's and vLLM's own classes, on a CPU: 420 MB of wheels, 1.1 GB, then 30 s"
	@echo 'make fuzz       every kind of input spoiled in some hundred ways, and what became of each: minutes'
	@echo 'make lint       ruff (lint, format) and mypy'
	@echo 'make notebooks  runs every notebook, top to bottom'
	@echo 'make live       every notebook on the machine at hand, and a tune through 05; what each cell showed: build/live/outputs.json'
	@echo 'make html       the notebooks, executed, as a gallery that needs no network: build/html/index.html'
	@echo 'make app        one notebook as an app, without its code, behind a token (NOTEBOOK=notebooks/01_roofline.ipynb)'
	@echo 'make pictures   docs/*.png, docs/figures.md and the README figure, from data/recordings (needs chromium)'
	@echo 'make gpu        on a GPU: the gpu tests, then every recording made again'
	@echo 'make sanitize   on an NVIDIA GPU: every kernel under compute-sanitizer (memcheck, racecheck)'
	@echo 'make tuned      on NVIDIA GPUs: tunes the table of models on all of them and records what it took, into tuned/;'
	@echo '                cut or stopped, the same command goes on (ARGS="--stop-after 8m --install", ARGS=--help)'
	@echo '                one model alone: ARGS="qwen3-30b-a3b/tp1 --parts tune grid"'
	@echo 'make configs    configs/ from the recording layer_classic: the fastest config of each batch size'
	@echo 'make record SUITE=sum_reduce   on a GPU: one recording made again'

setup: $(READY)

# --no-compile: bytecode is left to the first import; most files of torch and transformers never see one.
$(VENV)/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo 'moelab needs Python >= 3.11 and found none on PATH; give one: make PYTHON=/path/to/python3' >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV) || { echo 'no virtual environment (on Debian and Ubuntu: install python3-venv)' >&2; exit 1; }
	$(VENV)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	mkdir -p $(LAB_SETTINGS)
	echo '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": false}}' > $(LAB_SETTINGS)/overrides.json
	touch $@

# What the commands that read config files and models import; the others say what they lack. tests/test_light_cli.py holds it.
LIGHT := typer pydantic filelock google-re2 huggingface_hub
cli: .cli/.ready
	@echo '.cli/bin/moelab explain --help'

.cli/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo 'moelab needs Python >= 3.11 and found none on PATH; give one: make PYTHON=/path/to/python3' >&2; exit 1; }
	$(PYTHON) -m venv --clear .cli || { echo 'no virtual environment (on Debian and Ubuntu: install python3-venv)' >&2; exit 1; }
	.cli/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(LIGHT)
	.cli/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

lab: $(READY)
	JUPYTER_CONFIG_PATH=$(CURDIR)/app$(if $(JUPYTER_CONFIG_PATH),:$(JUPYTER_CONFIG_PATH)) $(PY) -m jupyterlab \
		--ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks/00_welcome.ipynb \
		$(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_ARGS)

LASTS := about 6 minutes on two cores

# The notebooks come first: they are long, and a run that ends with short tests keeps both processes busy to its end.
test: $(READY)
	@echo 'Tests and notebooks: $(LASTS), and the minutes that the first run needs to install what is missing.'
	$(PYTEST) -m 'not gpu and not whole' $(NBMAKE) notebooks tests $(ARGS)

whole: $(READY)
	$(PYTEST) -m 'whole and not gpu' tests $(ARGS)

notebooks: $(READY)
	$(if $(filter-out 0 1,$(WORKERS)),OMP_NUM_THREADS=1) $(PYTEST) $(NBMAKE) notebooks

# Of each test of a kernel its first and last case, and every kernel compiled for sm_90.
TRITON36 := build/triton36
TRITON36_TESTS := $(patsubst %,tests/test_%.py,launch interpreter activation align descriptors sum_reduce grouped_gemm \
	grouped_gemm_tma split_k_atomic split_k_workspace gated_gemm sorted_gemm few_tokens route expert_order token_tiles aot)

$(TRITON36)/.ready: $(READY)
	rm -rf $(TRITON36)
	$(PY) -m pip install --quiet --no-deps --no-compile --disable-pip-version-check --target $(TRITON36) triton==3.6.0
	touch $@

test-triton36: export PYTHONPATH := $(CURDIR)/$(TRITON36):$(CURDIR):$(CURDIR)/tests
test-triton36: $(TRITON36)/.ready
	$(PY) -c "import triton; assert triton.__version__ == '3.6.0', triton"
	$(PY) -m pytest -p first_and_last -n $(WORKERS) --dist worksteal -m 'not gpu and not whole' \
		-k 'not compiled_against and (sm_90 or not test_aot)' \
		$(TRITON36_TESTS) $(ARGS)

# The oldest torch that is allowed, which GPU nodes have: what torch.compile traces there is not what a newer one does.
TORCH211 := build/torch211
TORCH211_TESTS := $(patsubst %,tests/test_%.py,fused_moe out hf hf_fp8 hf_compiled module quantised_layer serve_bench serve_fp8)

$(TORCH211)/.ready: $(READY)
	rm -rf $(TORCH211)
	$(PY) -m pip install --quiet --no-compile --disable-pip-version-check --target $(TORCH211) torch==2.11.0
	touch $@

test-torch211: export PYTHONPATH := $(CURDIR)/$(TORCH211):$(CURDIR):$(CURDIR)/tests
test-torch211: $(TORCH211)/.ready
	$(PY) -c "import torch; assert torch.__version__.startswith('2.11.0'), torch"
	$(PYTEST) -m 'not gpu' $(TORCH211_TESTS) $(ARGS)

# Each engine's wheel alone, with what its classes import on a CPU, in an environment of its own over .venv's packages: the
# engines pin one another's versions, and GPU packages by the gigabyte, so nothing comes by their requirements.
ENGINES := build/engines

$(ENGINES)/%/.ready: tests/engines/%.txt $(READY)
	rm -rf $(@D)
	$(PY) -m venv --without-pip $(@D)
	$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/moelab_base.pth
	$(PY) -m pip --python $(@D)/bin/python install --quiet --no-deps --no-compile --disable-pip-version-check -r $<
	$(PY) -m pip --python $(@D)/bin/python install --quiet --no-deps --no-build-isolation --disable-pip-version-check -e .
	touch $@

test-engines: $(ENGINES)/sglang/.ready $(ENGINES)/vllm/.ready
	$(ENGINES)/sglang/bin/python -m pytest -m slow tests/test_engine_sglang.py $(ARGS)
	$(ENGINES)/vllm/bin/python -m pytest -m slow tests/test_engine_vllm.py $(ARGS)

# tests/live_notebooks.py compare DIR build/live sets it beside a run on another machine.
live: $(READY)
	$(PY) tests/live_notebooks.py run build/live $(NOTEBOOKS)
	$(PY) tests/live_notebooks.py tune build/live/tune $(BATCH)

# Every kind of input, spoiled by a seed; a few of each are in tests/test_fuzz.py (ARGS="--kind journals --count 1000 --seed 3").
fuzz: $(READY)
	cd tests && PYTHONPATH=.. $(if $(findstring /,$(PY)),$(abspath $(PY)),$(PY)) -m fuzz $(ARGS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

html: $(READY)
	$(PY) -m moelab.plots.gallery $(NOTEBOOKS)

# The config search is the app; a checkout without it shows the roofline.
NOTEBOOK ?= $(firstword $(wildcard notebooks/05_config_search.ipynb) notebooks/01_roofline.ipynb)

# The page opens by the link that is printed, with its token, as JupyterLab's does; its panels write below this folder alone.
APP_FOLDER ?= $(CURDIR)/tuned

app: $(READY)
	JUPYTER_CONFIG_PATH=$(CURDIR)/app JUPYTER_PATH=$(CURDIR)/app$(if $(JUPYTER_PATH),:$(JUPYTER_PATH)) MOELAB_APP_FOLDER=$(APP_FOLDER) \
		$(PY) -m voila $(NOTEBOOK) --template=moelab --Voila.auto_token=True $(APP_ARGS)

pictures: $(READY)
	$(PY) -m moelab.plots.pictures

gpu: $(READY)
	$(PY) -m pytest -m gpu tests $(ARGS)
	$(PY) -m moelab record all

# API errors are left out: cuda-bindings asks the driver for symbols that older drivers lack, and copes.
sanitize: $(READY)
	cd tests && for tool in memcheck racecheck; do \
		PYTHONPATH=.. PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 9 \
		$$([ $$tool = memcheck ] && echo --report-api-errors no) \
		$(if $(findstring /,$(PY)),$(abspath $(PY)),$(PY)) sanitize.py || exit; done

record: $(READY)
	$(PY) -m moelab record $(SUITE)

tuned: $(READY)
	$(PY) -m moelab.studies.fleet $(ARGS)

configs: $(READY)
	$(PY) -c "from moelab import recordings; from moelab.suites.layer_classic import write_configs; \
		print(*write_configs(recordings.load('layer_classic')), sep='\n')"

clean:
	rm -rf $(VENV) .cli build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
