# Everything for GPUs, from the package index: train, generate (vLLM), track.
#     docker build -t mpo-megatron .
#     docker run --gpus all --ipc host --ulimit memlock=-1 mpo-megatron mpo doctor
# The driver must know CUDA 13.0 (580 or newer). The image takes no CUDA toolkit from its base: the wheels bring what torch was built with.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# A compiler stays: Triton and torch.compile call it.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ git python3-dev python3-venv && rm -rf /var/lib/apt/lists/*
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH
RUN python3 -m venv /opt/venv && pip install --no-cache-dir 'uv>=0.9,<1'

WORKDIR /opt/mpo-megatron
COPY requirements-gpu.txt ./
# First what Transformer Engine's extension is built against, then everything; docs/installation.md has the reasons.
ARG MAX_JOBS=8
RUN uv pip install --no-cache --constraint requirements-gpu.txt torch 'cuda-toolkit[cccl,nvcc]' setuptools wheel ninja pybind11
RUN NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_FRAMEWORK=pytorch \
    uv pip install --no-cache --no-build-isolation-package transformer-engine-torch --requirement requirements-gpu.txt
COPY . .
RUN uv pip install --no-cache --no-deps --editable .
WORKDIR /workspace
CMD ["mpo", "doctor"]
