#!/usr/bin/env bash
# The measurements of one GPU, in order of value, on a machine that may be bare: what it lacks comes from gpu-wheels/.
#
#     benchmarks/gpu.sh                 # on a GPU: under 9 minutes
#     benchmarks/gpu.sh --device cpu    # the same sections on a CPU with a small model: nothing but a check of the script
#
# On a lent machine: make gpu-wheels first, carry gpu-wheels, and set OUT to the folder that comes back.
set -eu
cd "$(dirname "$0")/.."
began=$(date +%s)
python=${PYTHON:-python3}
wheels=$(realpath -m "${GPU_WHEELS:-gpu-wheels}")
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
for wheel in "$wheels"/*.whl; do
    [ -e "$wheel" ] || continue
    "$python" -m zipfile -e "$wheel" "$site"
done
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}"
if [ -z "${CAN_DIST_DATA:-}" ] && [ -d "$wheels/data" ]; then
    export CAN_DIST_DATA="$wheels/data"
fi
"$python" benchmarks/gpu_sections.py --began "$began" "$@"
