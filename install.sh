#!/bin/sh
# Installs what the project needs into .venv, from uv.lock; system packages by apt where that is allowed.
# `make` calls it when pyproject.toml or uv.lock are newer than the last installation.
set -eu
cd "$(dirname "$0")"

# FFCV is compiled from source; DALI and everything else come as wheels.
APT_PACKAGES="g++ libopencv-dev libturbojpeg0-dev pkg-config python3-dev"

say() { printf 'install: %s\n' "$*" >&2; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

can_apt() {
    command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }
}

apt_install() {
    as_root apt-get update -qq &&
        as_root env DEBIAN_FRONTEND=noninteractive \
            apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

has_ffcv_libraries() {
    command -v pkg-config >/dev/null && command -v c++ >/dev/null &&
        pkg-config --exists opencv4 libturbojpeg
}

find_uv() {
    if command -v uv >/dev/null; then
        command -v uv
    elif [ -x .uv/bin/uv ]; then
        echo .uv/bin/uv
    fi
}

install_uv() {
    say "uv is missing: putting it into .uv"
    # Debian's python3 comes without the module that makes virtual environments.
    if ! python3 -m venv .uv >/dev/null 2>&1; then
        rm -rf .uv
        if ! can_apt || ! apt_install python3-venv || ! python3 -m venv .uv; then
            say "cannot make a virtual environment; run: sudo apt-get install python3-venv"
            exit 1
        fi
    fi
    .uv/bin/pip install --quiet uv
}

UV=$(find_uv)
if [ -z "$UV" ]; then
    install_uv
    UV=.uv/bin/uv
fi

if ! has_ffcv_libraries && can_apt; then
    say "installing system packages for FFCV: $APT_PACKAGES"
    # shellcheck disable=SC2086 # a list of words
    apt_install $APT_PACKAGES || say "apt-get failed"
fi

# Compiled at once, because where Python may not write its bytecode (PYTHONDONTWRITEBYTECODE) every command
# compiles torch and torchvision anew: 17 s of CPU instead of 6.
# The project itself is installed as a link to this folder, so that the command `rsnet` runs what is here.
export UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-300}"
set -- sync --locked --quiet --compile-bytecode --extra train --extra timm --extra onnx --extra serve --extra hub \
    --extra gs --extra s3 --extra http
if has_ffcv_libraries; then
    "$UV" "$@" --extra ffcv || {
        say "FFCV cannot be built, for the reason above: going on without it"
        "$UV" "$@"
    }
else
    if command -v pkg-config >/dev/null && pkg-config --exists opencv5; then
        say "FFCV needs OpenCV 4, here is 5"
    fi
    say "without FFCV, which needs: sudo apt-get install $APT_PACKAGES"
    "$UV" "$@"
fi
