#!/usr/bin/env bash
# Makes .venv-oldest or .venv-newest, for `make test-oldest` and `make test-newest`: the packages in
# setup/requirements-NAME.txt before those of .venv. Environment: VENV names .venv; ACCELERATOR=cuda takes torch's build
# for NVIDIA GPUs (several GB) if .venv has one for CPUs and the index of those does not answer.
set -euo pipefail
cd "$(dirname "$0")/.."
main=${VENV:-.venv}
venv=$main-$1
list=setup/requirements-$1.txt
stamp=$venv/installed
. setup/cpu_index.sh
say() { echo "setup: $*" >&2; }

wanted=$(cat "$main/installed-test" "$list" setup/overlay.sh | cksum; echo "${ACCELERATOR:-}")
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    say "making $venv"
    rm -rf "$venv"
    "$main/bin/python" -m venv --without-pip "$venv"
    purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
    echo "import site; site.addsitedir('$("$main/bin/python" -c "$purelib")')" \
        >"$("$venv/bin/python" -c "$purelib")/main.pth"
    cp "$list" "$venv/requirements.txt"
    if [ "${ACCELERATOR:-cpu}" = cpu ] && "$main/bin/python" -c 'import sys, torch; sys.exit(bool(torch.version.cuda))'; then
        index=$(cpu_index)
        { echo "$index"; if [ -n "$index" ]; then cat "$list"; else grep -v '^torch' "$list"; fi; } >"$venv/requirements.txt"
        if [ -z "$index" ]; then say "torch stays as it is: $cpu_builds does not answer"; fi
    fi
    PIP_DISABLE_PIP_VERSION_CHECK=1 "$main/bin/python" -m pip --python "$venv/bin/python" \
        install -qq --no-warn-conflicts -r "$venv/requirements.txt"
    echo "$wanted" >"$stamp"
fi
sed -n 's/==.*//p' "$list" | sort -u | "$venv/bin/python" -c '
import sys
from importlib.metadata import version
print("setup:", *(f"{name} {version(name)}" for name in sys.stdin.read().split()), sep="  ")' >&2
