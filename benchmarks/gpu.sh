#!/usr/bin/env bash
# Check and measure all that needs a GPU; each part within ten minutes, its output in a file of its own.
#
#   benchmarks/gpu.sh FOLDER [tests] [step] [ways] [quantized] [data PHOTOS]
#
# FOLDER takes the output. PHOTOS: train/ and val/, for the loaders and a profile. No part named: all but data.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$1
shift
mkdir -p "$out"
python=${PYTHON:-.venv/bin/python}

keep() { # NAME COMMAND...: run it, keep what it prints, and go on whatever becomes of it
    local name=$1
    shift
    { echo "$ $*"; timeout 580 "$@" 2>&1; echo "exit code $?"; } | tee "$out/$name.txt"
}

nvidia-smi | tee "$out/nvidia-smi.txt" || { echo "gpu.sh: there is no GPU" >&2; exit 1; }
[ $# -gt 0 ] || set -- tests step ways quantized
while [ $# -gt 0 ]; do
    case $1 in
    tests) keep tests "$python" -m pytest -q -m gpu --show-capture=no ;;
    step)
        keep step "$python" -m benchmarks.throughput --batch-size 128 --rounds 20 --curve 50
        keep evaluation "$python" -m benchmarks.evaluation --batch-size 128 --rounds 10
        ;;
    ways)
        for arch in resnet50 resnet18 mobilenetv2; do
            keep "ways-$arch" "$python" -m benchmarks.step_ways --arch "parallel_$arch" --batch-size 128
        done
        ;;
    quantized) keep quantized "$python" -m benchmarks.quantized --rounds 14 ;;
    data)
        shift
        keep loaders "$python" -m benchmarks.loaders --data "$1" --batch-size 128 --workers 12
        for arch in resnet50 resnet18 mobilenetv2; do
            keep "profile-$arch" "$python" train_dali.py --data "$1" --arch "parallel_$arch" --batch-size 128 \
                --workers 12 --profile --wandb disabled --output "$out/profile-$arch"
        done
        ;;
    *) echo "no such part: $1" >&2 && exit 2 ;;
    esac
    shift
done
