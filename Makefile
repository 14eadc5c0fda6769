# nemo_srl. Each of these commands first installs what it needs, so a bare machine is enough.
#   make iterate     the default self-rewarding run (recipe srl-smollm2-135m-checked, and -large with an NVIDIA GPU)
#   make test        the tests
#   make proof       shows in minutes that self-rewarding beats shuffled scores (examples/proof); fails if it does not
#   make axes        the default run with three seeds, beside two controls: do answers and judging improve? (examples/axes)
#   make proof-full  the whole experiment of benchmarks/results/proof-*, in about an hour
#   make proof-methods  the same for every method of docs/methods.md: a table of true scores and judge accuracy
#   make vllm        installs vLLM for CPUs into build/vllm, and runs the tests that need it
#   make lock-check  shows that requirements.lock can be installed on every Python from 3.10 to 3.13
# PYTHON names the interpreter (3.10 to 3.13). ARGS goes to the program: make iterate ARGS="dpo.beta=0.2".
# TORCH is the build of torch: cpu, cuda, or auto. auto takes the CUDA build where there is an NVIDIA GPU.

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
TORCH  ?= auto
BIN    := $(VENV)/bin
# A GPU has time for six times the judging examples. A recipe in ARGS comes first.
GPU     = $(if $(filter cpu,$(TORCH)),,$(findstring GPU ,$(shell nvidia-smi -L 2>/dev/null)))
RECIPE  = $(if $(findstring recipe=,$(ARGS)),,$(if $(GPU),recipe=srl-smollm2-135m-checked-large))
STAMP  := $(VENV)/.installed-$(TORCH)-$(shell cksum requirements.lock pyproject.toml | cksum | cut -d' ' -f1)

.PHONY: iterate axes proof proof-full proof-methods test vllm check lock-check format install clean

iterate: install
	$(BIN)/python recipes/iterate.py $(RECIPE) $(ARGS)

axes: install
	$(BIN)/python examples/axes/axes.py run_dir=runs/axes $(ARGS)

proof: install
	$(BIN)/python examples/proof/prove.py --config-name srl-proof-cpu-small $(ARGS)

proof-methods: install
	$(BIN)/python examples/proof/prove.py --config-name srl-proof-cpu-methods $(ARGS)
	$(BIN)/python examples/proof/figures.py runs/srl-proof-cpu-methods/results.jsonl runs/srl-proof-cpu-methods

proof-full: install
	$(BIN)/python examples/proof/prove.py $(ARGS)
	$(BIN)/python examples/proof/figures.py runs/srl-proof-cpu/results.jsonl runs/srl-proof-cpu

test: install
	$(BIN)/python -m pytest $(ARGS)

vllm: install
	$(BIN)/python -m tools.install_vllm build/vllm
	NEMO_SRL_INSTALL_VLLM=1 $(BIN)/python -m pytest tests/vllm $(ARGS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

lock-check: install
	$(BIN)/python -m tools.lock_check

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(STAMP)

# The stamp's name has a checksum of these files, so make installs again after one of them was edited.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else \
	    "PYTHON=$(PYTHON) is Python %d.%d, and nemo_srl needs 3.10 to 3.13: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24,<26"
	$(BIN)/python -m tools.install $(TORCH)
	@rm -f $(VENV)/.installed-*
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
