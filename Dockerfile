# video-r1 on NVIDIA GPUs, with vLLM: the versions and the script of `make install`.
#
#   docker build -t video-r1-cuda .
#   docker run --rm --gpus all --shm-size 16g --user "$(id -u)" -v "$PWD":/data video-r1-cuda rl my.yaml
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
RUN if [ "$ACCELERATOR" = cuda ]; then \
        .venv/bin/pip install -q -c .venv/constraints.txt -e '.[qlora,deepspeed,trackers,smolvlm,math,studio]' \
        && setup/vllm.sh vllm; \
    fi

# Not root. With --user, another user than this one owns the files in /data; caches find USER and HOME all the same.
RUN useradd --create-home video-r1 && chmod 1777 /home/video-r1 && install -d -o video-r1 /data
ENV PATH=/opt/video-r1/.venv/bin:$PATH HF_HOME=/data/.cache/huggingface USER=video-r1 HOME=/home/video-r1
WORKDIR /data
USER video-r1
ENTRYPOINT ["video-r1"]
CMD ["--help"]
