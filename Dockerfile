# syntax=docker/dockerfile:1
# Quickchange's server and command, for a CPU or for NVIDIA GPUs:
#
#   docker build -t quickchange .
#   docker build -t quickchange:cuda --build-arg DEVICE=cuda .
#   docker build -t quickchange:demo --build-arg PRELOAD_BUILTIN=1 .
#
# podman and buildah: the same with `buildah build --format docker`, which keeps the health check.
#
# DEVICE           cpu or cuda: which build of PyTorch; a GPU's driver comes from the host
# PRELOAD_BUILTIN  1: put the small built-in base into the image; else it is fetched at the first start
# TORCH_CPU_INDEX  PyTorch's index of CPU builds, or a mirror of it
# PYTHON           3.11 or newer
ARG PYTHON=3.12

# Everything but Quickchange itself: by far the largest layer, which stays when only code changes.
FROM python:${PYTHON}-slim-bookworm AS libraries
ARG DEVICE=cpu
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN python -m venv /opt/quickchange
ENV PATH=/opt/quickchange/bin:$PATH
WORKDIR /src
COPY constraints.txt ./
RUN version=$(sed -n 's/^torch==//p' constraints.txt); \
    case "$DEVICE" in \
      cpu) pip install --index-url "$TORCH_CPU_INDEX" --no-deps "torch==$version" ;; \
      cuda) pip install "torch===$version" ;; \
      *) echo "DEVICE is '$DEVICE'; use cpu or cuda" >&2; exit 1 ;; \
    esac
COPY pyproject.toml ./
COPY clients/python/pyproject.toml clients/python/
COPY tools/requirements.py tools/
RUN python tools/requirements.py s3 postgres otel train > requirements.txt; \
    pip install -c constraints.txt -r requirements.txt

FROM libraries AS build
ARG PRELOAD_BUILTIN=0
ENV QUICKCHANGE_CACHE=/var/cache/quickchange
# Debian keeps one version of a package for a release: a pinned one could not be had for long.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY README.md LICENSE ./
COPY server server
COPY adapters/quickchange_adapters adapters/quickchange_adapters
COPY clients/python clients/python
RUN pip wheel --no-deps --wheel-dir /wheels . ./clients/python; \
    pip install --no-deps --no-index /wheels/*.whl; \
    pip check
# Compiled here, as the image has no C++ compiler, and readable for whoever runs it; used where a CPU has
# the instructions.
RUN mkdir -p "$QUICKCHANGE_CACHE/models" "$QUICKCHANGE_CACHE/store" /var/lib/quickchange; \
    python -m quickchange_adapters.native --any-cpu; \
    chmod -R a+rX "$QUICKCHANGE_CACHE/native"
RUN if [ "$PRELOAD_BUILTIN" = 1 ]; then quickchange-server base path --model builtin:smollm2-135m; fi

FROM python:${PYTHON}-slim-bookworm
ARG DEVICE=cpu
LABEL org.opencontainers.image.title="Quickchange" \
      org.opencontainers.image.description="One resident base, many LoRA adapters, inside one running batch" \
      org.opencontainers.image.licenses="Apache-2.0"
# What the native library's OpenMP needs; on GPUs, Triton compiles what launches its kernels.
# hadolint's rule: as above.
# hadolint ignore=DL3008
RUN if [ "$DEVICE" = cuda ]; then set -- gcc libc6-dev; fi; \
    apt-get update && apt-get install -y --no-install-recommends libgomp1 "$@" && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 quickchange \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin quickchange
COPY --from=libraries /opt/quickchange /opt/quickchange
# Copied rather than mounted: some builders would take an old layer from their cache.
COPY --from=build /wheels /opt/quickchange/wheels
RUN /opt/quickchange/bin/pip install --no-cache-dir --no-deps --no-index /opt/quickchange/wheels/*.whl
COPY --from=build --chown=0:0 /var/cache/quickchange/native /var/cache/quickchange/native
COPY --from=build --chown=10001:10001 /var/cache/quickchange/models /var/cache/quickchange/models
COPY --from=build --chown=10001:10001 /var/cache/quickchange/store /var/cache/quickchange/store
COPY --from=build --chown=10001:10001 /var/lib/quickchange /var/lib/quickchange
ENV PATH=/opt/quickchange/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/var/cache/quickchange/models/hub \
    QUICKCHANGE_CACHE=/var/cache/quickchange \
    QUICKCHANGE_STORE=/var/lib/quickchange \
    QUICKCHANGE_HOST=0.0.0.0 \
    QUICKCHANGE_PORT=8000
# Numbers, so that Kubernetes can see that it is not root.
USER 10001:10001
WORKDIR /tmp
VOLUME ["/var/lib/quickchange"]
EXPOSE 8000
# The first start may fetch a base; the orchestrator's own probes are finer.
HEALTHCHECK --interval=15s --timeout=5s --start-period=20m --retries=4 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f\"http://127.0.0.1:{os.environ['QUICKCHANGE_PORT']}/livez\", timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["quickchange"]
CMD ["serve"]
