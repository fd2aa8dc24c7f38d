# syntax=docker/dockerfile:1
# Three targets: gateway (neither torch nor an engine), full (embedded engines, import and export), triton (NVIDIA's).
#   docker build --target gateway -t policy-gateway .

ARG PYTHON=3.11.14-slim-bookworm
# Ubuntu 24.04 with Python 3.12, TensorRT and ONNX Runtime backends.
ARG TRITON=24.12-py3

FROM python:${PYTHON} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/policy
COPY pyproject.toml README.md LICENSE CHANGELOG.md constraints.txt ./
COPY policy_server policy_server
COPY models/policy_models models/policy_models
COPY clients clients

FROM build AS build-gateway
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/policy/bin/pip install --constraint constraints.txt ".[gateway,triton]"

FROM build AS build-full
# torch comes with CUDA, several GB; an index that has the build for CPUs spares that.
ARG PIP_EXTRA_INDEX_URL=
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/policy/bin/pip install --constraint constraints.txt ".[serve,triton,export]"

FROM python:${PYTHON} AS base
RUN useradd --system --uid 10001 --no-create-home policy
ENV PATH=/opt/policy/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=3s --start-period=120s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
ENTRYPOINT ["policy-server"]

FROM base AS gateway
COPY --from=build-gateway /opt/policy /opt/policy
CMD ["serve", "/bundles", "--engine", "triton", "--triton-url", "triton:8001", "--host", "0.0.0.0"]

FROM base AS full
COPY --from=build-full /opt/policy /opt/policy
COPY models/zoo /bundles
CMD ["serve", "/bundles", "--host", "0.0.0.0"]

FROM nvcr.io/nvidia/tritonserver:${TRITON} AS triton
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
COPY --from=build /src /src
# Models of the Python backend run in the image's own Python, which Ubuntu reserves for its packages.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --break-system-packages "/src[triton-backend]" && rm -rf /src
USER 1000
EXPOSE 8001 8002 8003
HEALTHCHECK --interval=5s --timeout=3s --start-period=60s \
    CMD ["curl", "--fail", "--silent", "http://127.0.0.1:8003/v2/health/live"]
CMD ["tritonserver", "--model-repository=/triton_repo", "--model-control-mode=explicit", \
     "--disable-auto-complete-config", "--grpc-port=8001", "--metrics-port=8002", "--http-port=8003"]
