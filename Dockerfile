# The command line on a CPU.
#
#   docker build -t compress .
#   docker run --rm -v "$PWD/out:/work/out" compress run qwen-moe-2bit
#   docker run --rm -it -v "$PWD/out:/work/out" compress chat out/qwen-moe-2bit
#
# pip's default torch for Linux brings CUDA packages; --build-arg TORCH_ARGS="--index-url ..." takes it from an index of CPU builds.

ARG BASE=debian:bookworm-slim

FROM ${BASE} AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-dev python3-venv g++ make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/compress
COPY . .
ARG TORCH_ARGS=
RUN PIP_NO_CACHE_DIR=1 make install TORCH_ARGS="${TORCH_ARGS}"

FROM ${BASE}
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 libgomp1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/compress /opt/compress
ENV PATH=/opt/compress/.venv/bin:${PATH} COMPRESS_CACHE=/work/.cache/compress HF_HOME=/work/.cache/huggingface
WORKDIR /work
ENTRYPOINT ["compress"]
CMD ["--help"]
