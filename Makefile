# `make demo` and `make test` need Python 3.11 or newer and make, nothing else: they make .venv.
# `make clip-demo` fetches its images by npm.
# Settings: make demo PYTHON=python3.12 · make test PYTEST_ARGS="-k scan" ·
#   make gpu-check GPU_CHECK_ARGS="--only kernels" · VENV=folder ·
#   make bench BASE=main BENCH_ARGS="--only step data"

VENV ?= .venv
PYTEST_ARGS ?=
GPU_CHECK_ARGS ?=
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo clip-demo test check docs offline-rgb kernel-report bench gpu-check clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

setup: $(VENV)/.installed-dev ## make .venv and install everything, the tools for `make check` too

demo: $(VENV)/.installed-demo ## pretrain on real digits, probe what was learned, leave a report
	$(BIN)/python recipes/mim_pretrain.py
	$(BIN)/python downstream/linear_probe.py
	$(name_report)

clip-demo: $(VENV)/.installed-demo ## pretrain on emoji of two vendors and their names, search a third's
	$(BIN)/vim-ssl samples get noto-emoji twemoji fluent-emoji
	$(BIN)/python recipes/clip_pretrain.py --preset emoji_clip
	@echo; echo "A third vendor's drawings of emoji that training had of the other two:"
	$(BIN)/python downstream/zero_shot.py --templates '{}' \
	  --data 'sample:fluent-emoji?split=train&tones=none'
	@echo; echo "And of emoji that it had of none:"
	$(BIN)/python downstream/zero_shot.py --templates '{}' \
	  --data 'sample:fluent-emoji?split=test&tones=none'
	$(name_report)

# No test takes ten minutes: one that hangs is named and ends its process.
test: $(VENV)/.installed-test ## run the whole suite on the CPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadscope \
		--no-loadscope-reorder --max-worker-restart 1 \
		-o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true $(PYTEST_ARGS)

check: $(VENV)/.installed-dev ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/check_types.py

docs: $(VENV)/.installed-dev ## build the documentation in site/, warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

SAMPLES := noto-emoji fluent-emoji twemoji aerial
OFFLINE_RGB := vim_ssl/weights/vim_mini_patch8_96.offline_rgb
offline-rgb: $(VENV)/.installed-demo ## train the suite's own encoder anew, an hour of one core
	$(BIN)/vim-ssl samples get $(SAMPLES)
	$(BIN)/python recipes/mim_pretrain.py --preset offline_rgb \
	  --output runs/offline_rgb --resume auto
	mkdir -p $(OFFLINE_RGB)
	cd runs/offline_rgb && cp encoder.json encoder.safetensors config.json metrics.jsonl \
	  ../../$(OFFLINE_RGB)

kernel-report: $(VENV)/.installed-demo ## check every scan backend of this machine against float64
	$(BIN)/python -m vim_ssl.kernels.selective_scan.accuracy

bench: $(VENV)/.installed-demo ## time the scan and the CPU path; BASE=COMMIT: what got slower since
ifeq ($(origin BASE),command line)
	$(BIN)/python benchmarks/compare_commits.py $(BASE) $(BENCH_ARGS)
else
	$(BIN)/python benchmarks/kernels/timing.py --device cpu
	$(call run_if_built,benchmarks/cpu.py,benchmarks/cpu.py)
endif

gpu-check: $(VENV)/.installed-test ## everything that needs a GPU, in 14 minutes
	$(BIN)/python benchmarks/gpu_check.py $(GPU_CHECK_ARGS)

clean: ## remove .venv and what tools left behind; runs/ stays
	rm -rf "$(VENV)" build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache

# The newest run's page.
define name_report
@page=$$(ls -t runs/*/report.html 2>/dev/null | head -n 1); \
  if [ -n "$$page" ]; then echo; echo "The report: $$page"; \
  else echo "make $@: the run left no report.html under runs/." >&2; exit 1; fi
endef

# $(call run_if_built,file,arguments of python)
run_if_built = $(if $(wildcard $(1)),$(BIN)/python $(2),@echo "make $@: not built yet." >&2; exit 1)

# ------------------------------------------------------------------------------ installing

# One stamp per extra, made again when the requirements change; a larger set counts for the smaller.
comma := ,
$(VENV)/.installed-demo: EXTRAS := demo
$(VENV)/.installed-test: EXTRAS := demo,test
$(VENV)/.installed-dev: EXTRAS := demo,test,dev
$(VENV)/.installed-%: pyproject.toml setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --editable ".[$(EXTRAS)]"
	@touch $(patsubst %,$(VENV)/.installed-%,$(subst $(comma), ,$(EXTRAS)))

$(BIN)/python:
	@set -eu; found=; \
	for python in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python); do \
	  if "$$python" -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; then \
	    found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "make: $(or $(PYTHON),python3) is missing or older than Python 3.11." >&2; \
	  echo "Install a newer one and name it: make $(or $(MAKECMDGOALS),setup) PYTHON=python3.12" >&2; \
	  exit 1; \
	fi; \
	if ! "$$found" -c "import ensurepip, venv" 2>/dev/null; then \
	  echo "make: $$found cannot make virtual environments." >&2; \
	  echo "On Debian and Ubuntu: apt install python3-venv. Or name another: PYTHON=..." >&2; \
	  exit 1; \
	fi; \
	echo "Making $(VENV) with $$("$$found" --version)"; \
	"$$found" -m venv "$(VENV)"
