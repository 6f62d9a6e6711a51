#!/usr/bin/env bash
# Builds, tests and measures on a real card in about ten minutes.
#
#     benchmarks/cuda.sh [--dry-run] OUTPUT
#
# OUTPUT gets what each step printed (the benchmarks print JSON), and summary.txt with how it ended. A step that fails does not keep
# the others from running; the script then ends with 1. Environment:
#
#     DEVICE    cuda (default), cpu, ...
#     PYTHON    a python with torch (default python3); what else is needed goes into a virtual environment beside it
#     INSTALL   0: use PYTHON as it is, with the package and pytest installed
#     TOKENS    length of the measured document (default 8000)
#     STEPS     which of venv install machine tests start model to take (default all)
#     MODEL     folder of a base model to measure (default: the embedded one)
set -euo pipefail

dry_run=0
if [[ ${1:-} == --dry-run ]]; then
    dry_run=1
    shift
fi
if [[ $# -ne 1 || $1 == -* ]]; then
    echo "usage: benchmarks/cuda.sh [--dry-run] OUTPUT" >&2
    exit 2
fi

here=$(cd "$(dirname "$0")/.." && pwd)
output=$1
device=${DEVICE:-cuda}
python=${PYTHON:-python3}
tokens=${TOKENS:-8000}
model=(${MODEL:+--model "$MODEL"})
steps=" ${STEPS:-venv install machine tests start model} "
failed=0

# step NAME SECONDS COMMAND...: runs a command for so long at most; what it prints goes to NAME.log and NAME.err.
step() {
    local name=$1 limit=$2 began=$SECONDS status=0
    shift 2
    [[ $steps == *" $name "* ]] || return 0
    if ((dry_run)); then
        printf '%s (at most %s s):' "$name" "$limit"
        printf ' %q' "$@"
        printf '\n'
        return
    fi
    timeout "$limit" "$@" > "$output/$name.log" 2> "$output/$name.err" || status=$?
    ((status == 0)) || failed=1
    printf '%-10s %s in %d s\n' "$name" "$( ((status)) && echo "FAILED ($status)" || echo ok)" $((SECONDS - began)) |
        tee -a "$output/summary.txt"
}

if ((!dry_run)); then
    mkdir -p "$output"
    output=$(cd "$output" && pwd)
    : > "$output/summary.txt"
fi
cd "$here"

if [[ ${INSTALL:-1} != 0 ]]; then
    # with the torch of PYTHON, which is made for the card's driver
    step venv 60 "$python" -m venv --system-site-packages "$output/venv"
    python=$output/venv/bin/python
    step install 300 "$python" -m pip install --quiet -c constraints.txt ".[train]" pytest pytest-timeout
fi
step machine 60 "$python" -c "
import torch, transformers
device = torch.device('$device')
torch.ones(1, device=device).item()
print(torch.__version__, transformers.__version__, device)
print(torch.cuda.get_device_name(device) if device.type == 'cuda' else 'no card')"
step tests 240 env BEACON_MEMORY_TEST_DEVICE="$device" "$python" -m pytest -q -p no:cacheprovider tests/test_real_device.py
step start 120 "$python" -m beacon_memory bench start --device "$device" --json "${model[@]}"
step model 300 "$python" -m beacon_memory bench model --device "$device" --tokens "$tokens" --json "${model[@]}"
exit "$failed"
