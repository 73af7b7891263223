# The server. For a CPU:
#
#   docker build -t qsharp .
#   docker run -p 8000:8000 -v /path/to/models:/models:ro qsharp --ref /models/REF --guide good=/models/GUIDE
#
# For NVIDIA GPUs: docker build --build-arg EXTRAS=serve,cuda -t qsharp . and docker run --gpus all ...; CUDA's libraries
# come as Python packages, the driver from the host.
FROM python:3.12-slim

ARG EXTRAS=serve
WORKDIR /src
COPY setup.py requirements.txt README.md LICENSE ./
COPY qsharp_jax qsharp_jax
RUN pip install --no-cache-dir ".[${EXTRAS}]" && rm -rf /src/*

RUN useradd --create-home qsharp
USER qsharp
WORKDIR /home/qsharp
# Compiled programs, so that a restarted container is ready sooner; mount a volume here to keep them.
ENV JAX_COMPILATION_CACHE_DIR=/home/qsharp/programs
EXPOSE 8000
HEALTHCHECK --interval=10s --start-period=600s CMD \
    ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["qsharp", "serve", "--host", "0.0.0.0"]
