#!/usr/bin/env bash
# Makes .venv with everything that the demo and the tests need. Safe to run again.
# usage: infra/install.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}

# Debian splits venv off Python; the interpreter of pyenv, conda and the like has it.
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    sudo=$([ "$(id -u)" = 0 ] || echo sudo)
    $sudo apt-get update -qq
    $sudo apt-get install -qq -y --no-install-recommends python3 python3-venv
    python=$(command -v "$python" || command -v python3)
fi

[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip --disable-pip-version-check)
"${pip[@]}" install --quiet --upgrade 'pip>=24'
# Constrained, so that a clean checkout stays what was tested when others release.
install=("${pip[@]}" install --quiet --constraint infra/constraints.txt)
# torch first and pinned: deepspeed's build imports it, and an unpinned torch brings gigabytes of CUDA libraries.
"${install[@]}" "torch==${TORCH_VERSION:-2.13.0}" setuptools wheel
# No extension of DeepSpeed is compiled: the operators that we use are torch's.
DS_BUILD_OPS=0 "${install[@]}" --no-build-isolation 'deepspeed==0.19.8'
"${install[@]}" --editable '.[dev]'
