# Every target sets up what it needs; the set-up runs again only when its inputs have changed.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
# One thread per process: the tests' models are too small for more, and pytest-xdist runs two processes.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

# Tests run on the CPU, also on a machine with GPUs: `make gpu-check` has the tests that need one.
PYTEST := $(ONE_THREAD) CUDA_VISIBLE_DEVICES= $(PY) -m pytest -n 2 --dist loadgroup

.PHONY: help install install-test demo test test-slow test-all test-oldest test-newest check docs screenshots gpu-check bench

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

install: ## set up .venv
	@PYTHON=$(PYTHON) VENV=$(VENV) setup/install.sh

install-test: install ## add what tests use besides: DeepSpeed, bitsandbytes, trackers, vLLM for CPUs
	@VENV=$(VENV) setup/install-test.sh

demo: install ## the whole pipeline on made-up clips, under 5 minutes on two cores; see runs/demo (FAMILY=qwen3_5: another model)
	$(PY) -m video_r1 demo $(if $(FAMILY),--family $(FAMILY))

test: install-test ## the fast tests, on the CPU (ARGS="tests/test_settings.py -x": some of them)
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: install-test ## the slow tests alone: several processes, vLLM, browsers, long runs
	$(PYTEST) -m slow $(ARGS)

test-all: ## `make test`, then the slow tests
	@$(MAKE) --no-print-directory test
	@$(MAKE) --no-print-directory test-slow

test-oldest: install-test ## the fast tests with the oldest versions in the ranges of pyproject.toml
	@VENV=$(VENV) setup/overlay.sh oldest
	$(subst $(PY),$(VENV)-oldest/bin/python,$(PYTEST)) -m "not slow and not vllm" $(ARGS)

test-newest: install-test ## the fast tests with the newest versions in the ranges of pyproject.toml
	@VENV=$(VENV) setup/overlay.sh newest
	$(subst $(PY),$(VENV)-newest/bin/python,$(PYTEST)) -m "not slow and not vllm" $(ARGS)

check: install-test ## ruff, pyright and the layers of docs/design.md
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright
	$(VENV)/bin/lint-imports --no-logo

docs: install ## the pages of docs/ and the API reference as a site, in build/site
	@$(PY) -m pip install -qq --disable-pip-version-check --no-warn-conflicts -c $(VENV)/constraints.txt -e '.[docs]'
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

screenshots: install-test ## each page of video-r1 studio at three widths, in screenshots/
	cd tests && ../$(PY) studio_screenshots.py ../screenshots $(ARGS)

gpu-check: install-test ## on a machine with a GPU: everything that tests on CPUs cannot show, in 45 minutes at most
	@$(PY) tests/gpu_check.py $(ARGS)

bench: install-test ## every benchmark (ARGS="update rollout": some); figures and tables of docs/ follow
	@$(PY) -m pip install -qq --disable-pip-version-check --no-warn-conflicts -c $(VENV)/constraints.txt -e '.[bench]'
	@$(PY) -m benchmarks.docs_tables $(or $(ARGS),all)
