# CAN-Dist as an image; what was tried of it and what not: docs/installation.md.
#
#   docker build --target cuda -t can-dist:0.1.0 .
#   docker build --target cpu -t can-dist:0.1.0-cpu --build-arg PIP_EXTRA_INDEX_URL=... .
#
# pip takes its settings from the build arguments PIP_INDEX_URL, PIP_EXTRA_INDEX_URL and PIP_FIND_LINKS. PyPI's torch is for
# CUDA; the smaller one for CPUs is on PyTorch's own index.
ARG CPU_BASE=python:3.12-bookworm
# of the same CUDA major version as torch, with nvcc: DeepSpeed compiles what offloading needs
ARG CUDA_BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04

FROM ${CPU_BASE} AS wheel
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS
WORKDIR /can-dist
COPY . .
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir wheels .

FROM ${CPU_BASE} AS cpu
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS
RUN useradd --create-home --uid 2000 can-dist
WORKDIR /can-dist
COPY --from=wheel /can-dist/wheels wheels
COPY constraints.txt .
# the job scripts lie under the path that ray_jobs/kuberay.yaml names
RUN python -m pip install --no-cache-dir --constraint constraints.txt wheels/*.whl && \
    can-dist files ray_jobs
USER 2000
WORKDIR /home/can-dist
CMD ["can-dist", "--help"]

FROM ${CUDA_BASE} AS cuda
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS
# wget: KubeRay's probes; g++ and python3-dev: Triton and DeepSpeed compile. The base image's tag decides their versions.
# KubeRay starts a login shell, which sets PATH anew
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install -y --no-install-recommends g++ python3 python3-dev python3-venv wget && \
    rm -rf /var/lib/apt/lists/* && \
    useradd --create-home --uid 2000 can-dist && \
    python3 -m venv /opt/can-dist && \
    echo "export PATH=/opt/can-dist/bin:\$PATH" > /etc/profile.d/can-dist.sh
ENV PATH=/opt/can-dist/bin:$PATH
WORKDIR /can-dist
COPY --from=wheel /can-dist/wheels wheels
COPY constraints.txt .
# flash-attn from a wheel for this torch, CUDA and Python, where its makers or PIP_FIND_LINKS have one. It is not compiled,
# which takes hours: where there is no wheel nothing of it stays, and torch's varlen attention computes the packs
RUN python -m pip install --no-cache-dir --constraint constraints.txt wheels/*.whl "wheel<1" && \
    can-dist files ray_jobs && \
    if ! { FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE \
           python -m pip install --no-cache-dir --no-build-isolation --no-deps "flash-attn>=2.8,<3" && \
           python -c "import torch, flash_attn_2_cuda"; }; then \
        python -m pip uninstall --yes flash-attn; \
    fi
USER 2000
WORKDIR /home/can-dist
CMD ["can-dist", "--help"]
