#!/bin/sh
# Runs the default tests with the oldest torch and torchvision that pyproject.toml promises, and all else as
# locked, in an environment of its own, .venv-oldest. Arguments: pytest's.
set -eu
cd "$(dirname "$0")/.."
UV=$(command -v uv || echo .uv/bin/uv) # ./install.sh brings it
PYTHON=.venv-oldest/bin/python
EXTRAS="train timm onnx serve hub"

oldest() { # NAME: its requirement
    sed -n "s/^    \"$1>=\(.*\)\",\$/$1==\1.*/p" pyproject.toml
}

"$UV" venv --quiet --allow-existing .venv-oldest
# What torch brings along is of its own version.
# shellcheck disable=SC2046 # a word for each extra
"$UV" export --quiet --frozen --no-hashes --no-emit-project $(printf -- '--extra %s ' $EXTRAS) |
    grep -vE '^(torch|torchvision|triton|setuptools|cuda-[a-z]+|nvidia-(cu|nccl|nv(jitlink|shmem|tx))[a-z0-9-]*)==' \
        >.venv-oldest/constraints.txt
"$UV" pip install --quiet --python "$PYTHON" --constraints .venv-oldest/constraints.txt \
    --editable ".[$(echo $EXTRAS | tr ' ' ',')]" --group dev "$(oldest torch)" "$(oldest torchvision)"
# torch 2.11 warns of itself when it imports its compiler and when it saves an exported program.
exec env OMP_NUM_THREADS=1 "$PYTHON" -m pytest -n 2 --dist worksteal \
    -W 'ignore:`torch.jit.script_method` is deprecated:DeprecationWarning' \
    -W 'ignore:The given buffer is not writable:UserWarning' "$@"
