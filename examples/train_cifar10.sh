#!/usr/bin/env bash
# Train one network for five resolutions on CIFAR-10, release it, and classify an image with it.
#
#     examples/train_cifar10.sh DATA [OUTPUT [OPTION...]]
#
# It needs the command rsnet: `make install` and `source .venv/bin/activate`, or `pip install ".[train]"`.
#
# DATA     folder of JPEGs or PNGs: DATA/train/CLASS/*.jpg and DATA/val/CLASS/*.jpg (the test split is "val")
# OUTPUT   folder for the run and the release; runs/cifar10 if not given
# OPTION   any option of `rsnet train`; it replaces the one below, e.g. --epochs 30
#
# Expected: a table of accuracy by resolution, and the three most likely classes of one image. On CIFAR-10
# (50,000 images to train on, 10,000 to evaluate), with one of two shared cores of an AMD EPYC in float32,
# the first of the two epochs and its evaluation took about 8.5 minutes of CPU time, the start included;
# top-1 was then 46.6, 45.9, 46.6, 45.3 and 44.1 % at 32, 28, 24, 20 and 16 pixels. The second epoch has not
# been measured.
#
# The same command resumes an interrupted run. On a GPU take the full network: remove --width-mult, set
# --arch parallel_resnet18 and --epochs 30.
set -euo pipefail

data=${1:?usage: examples/train_cifar10.sh DATA [OUTPUT [OPTION...]]}
output=${2:-runs/cifar10}
options=("${@:3}")

# --stem small: a 3 x 3 convolution of stride 1 in place of ImageNet's 7 x 7 of stride 2 and pooling, which
# would leave one pixel of an image of 32. The sizes are in pixels; 32 is the size of the files.
rsnet train --data "$data" --output "$output/run" \
    --arch parallel_resnet10 --width-mult 0.25 --stem small --sizes 32 28 24 20 16 \
    --recipe short --epochs 2 --batch-size 128 --lr 0.1 --workers 1 "${options[@]}"

# The best weights with all that is needed to use them: config.json, model.safetensors, a model card.
rsnet release "$output/run" --output "$output/release"

# All five resolutions are in the release; each call chooses one.
image=$(find "$data/val" -type f -print -quit)
rsnet predict "$output/release" "$image" --size 16 --top 3
