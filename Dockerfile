# video-r1 on NVIDIA GPUs, with vLLM: the versions and the script of `make install`.
#
#   docker build -t video-r1-cuda .
#   docker run --rm --gpus all --shm-size 16g -v "$PWD":/data video-r1-cuda rl my.yaml
#
# That is one process on one GPU; docs/recipes.md has the line for several.
FROM nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04

# gcc and Python's headers: Triton compiles its kernels where they run.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates gcc g++ git python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/video-r1
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY setup setup
COPY src src
ENV PIP_NO_CACHE_DIR=1
ARG ACCELERATOR=cuda
RUN ACCELERATOR=$ACCELERATOR setup/install.sh
RUN if [ "$ACCELERATOR" = cuda ]; then .venv/bin/pip install -q -c .venv/constraints.txt -e '.[qlora,deepspeed,vllm,trackers,smolvlm,math,studio]'; fi

ENV PATH=/opt/video-r1/.venv/bin:$PATH HF_HOME=/data/.cache/huggingface
WORKDIR /data
ENTRYPOINT ["video-r1"]
CMD ["--help"]
