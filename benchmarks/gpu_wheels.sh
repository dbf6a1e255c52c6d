#!/usr/bin/env bash
# Collect what a bare GPU machine lacks: wheels for its Python, and the tokenizer of the small model.
#
#     benchmarks/gpu_wheels.sh 3.12 gpu-wheels
#
# The versions are those of constraints.txt. The machine is taken to have torch, transformers, accelerate, peft, triton,
# numpy, pyarrow, numba, scipy and pytest. Ray is left out: its wheel alone is 79 MB, and no section needs it.
set -eu
cd "$(dirname "$0")/.."
version=$1
folder=$2
python=${PYTHON:-python3}
data=${CAN_DIST_DATA:-../shared/data}
model=models/stories3M-qa-sft
platform=$(uname -m)
packages="annotated-types datasets dill hjson liger-kernel multiprocess pydantic pydantic-core ruamel.yaml tensorboardX trl
    typing-inspection msgpack py-cpuinfo einops xxhash pandas python-dateutil six"
rm -rf "$folder"
mkdir -p "$folder/data/$model"
# pip applies the constraints of the machine it runs on, so a version is named once more
pins=$(for package in $packages; do
    grep -iE "^$package==" constraints.txt | cut -d' ' -f1 | cut -d';' -f1 | tail -1 | grep . || echo "$package"
done)
# pip tries the platforms in this order
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version "$version" \
    --platform "manylinux_2_28_$platform" --platform "manylinux_2_17_$platform" --platform "manylinux2014_$platform" \
    --dest "$folder" $pins
# built without its operations it is pure Python: they are compiled where they are used, and ours uses none
DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$folder" \
    "$(grep '^deepspeed==' constraints.txt)"
for file in config.json tokenizer.json tokenizer_config.json; do
    if [ ! -e "$data/$model/$file" ]; then
        echo "gpu_wheels.sh: $data/$model/$file is missing; set CAN_DIST_DATA to the folder of the models" >&2
        exit 6
    fi
    cp "$data/$model/$file" "$folder/data/$model/"
done
chmod -R u+w "$folder"
wheels=$(du -sk "$folder" | cut -f1)
tree=$(git ls-files -z | xargs -0 du -ck | tail -1 | cut -f1)
echo "gpu-wheels: $(ls "$folder"/*.whl | wc -l) wheels for Python $version, $((wheels / 1024)).$((wheels % 1024 * 10 / 1024)) MiB in $folder;" \
    "with the tree $(((wheels + tree) / 1024)) of 64 MiB"
if [ $((wheels + tree)) -gt 65536 ]; then
    echo "gpu_wheels.sh: more than 64 MiB travel to no lent machine; leave something out" >&2
    exit 6
fi
