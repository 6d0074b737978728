# Training on NVIDIA's PyTorch container:
#
#     docker build -t rsnet .
#     docker run --gpus all --ipc=host -v /data:/data rsnet train --data /data/imagenet --output /data/runs/first
#
# It has not been built: it was written where there is no Docker. Set PYTORCH to a release whose torch is 2.12
# or newer: the container's builds are numbered as pre-releases (2.12.0a0), which pip takes to be older than
# the version that they become, and pyproject.toml asks for 2.11.
ARG PYTORCH=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${PYTORCH}

# What FFCV is compiled with, as in install.sh.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        g++ libopencv-dev libturbojpeg0-dev pkg-config python3-dev \
    && rm -rf /var/lib/apt/lists/*

# The container's own constraints keep pip from replacing its torch and torchvision.
COPY LICENSE README.md pyproject.toml /opt/rsnet/
COPY pipelines /opt/rsnet/pipelines
COPY rsnet /opt/rsnet/rsnet
RUN pip install --no-cache-dir "/opt/rsnet[gs,hub,onnx,s3,serve,timm,train]"
# It is compiled, which may fail without taking the rest along.
RUN pip install --no-cache-dir "/opt/rsnet[ffcv]" || echo "going on without FFCV"

WORKDIR /workspace
ENTRYPOINT ["rsnet"]
CMD ["--help"]
