# The server. For a CPU:
#
#   docker build -t qsharp .
#   docker run --init -p 8000:8000 -e QSHARP_API_KEY=KEY -v /path/to/models:/models:ro qsharp --ref /models/REF \
#       --guide good=/models/GUIDE
#
# For NVIDIA GPUs: docker build --build-arg EXTRAS=serve,cuda --build-arg PLATFORMS=cuda,cpu -t qsharp . and docker run
# --gpus all ...; CUDA's libraries come as Python packages, the driver from the host. Without a GPU it does not start.
#
# `docker stop` kills after 10 s: give `docker run --stop-timeout 600` to answer what has been asked.
FROM python:3.12-slim

ARG EXTRAS=serve
WORKDIR /src
COPY setup.py requirements.txt README.md LICENSE ./
COPY qsharp_jax qsharp_jax
RUN pip install --no-cache-dir ".[${EXTRAS}]" && rm -rf /src/*

RUN useradd --create-home qsharp
USER qsharp
WORKDIR /home/qsharp
# Mount volumes here to keep compiled programs, so that a restarted container is ready sooner, and models from the hub.
RUN mkdir programs .cache
ARG PLATFORMS=cpu
ENV JAX_COMPILATION_CACHE_DIR=/home/qsharp/programs JAX_PLATFORMS=${PLATFORMS} XLA_PYTHON_CLIENT_MEM_FRACTION=0.9
EXPOSE 8000
HEALTHCHECK --interval=10s --start-period=600s CMD \
    ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["qsharp", "serve", "--host", "0.0.0.0"]
