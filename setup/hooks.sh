#!/usr/bin/env bash
# Has git run the checks of .pre-commit-config.yaml before a commit. In a clone only, whose hooks are its own and
# whose environment is .venv, which these checks use.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -e .git ] || [ "${VENV:-.venv}" != .venv ] || ! command -v git >/dev/null; then exit 0; fi
if [ -n "$(git config core.hooksPath || true)" ]; then
    echo "setup: git's core.hooksPath is set, so pre-commit is left to you" >&2
    exit 0
fi
.venv/bin/pre-commit install >/dev/null
