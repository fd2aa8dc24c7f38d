# syntax=docker/dockerfile:1
# Four targets: gateway (neither torch nor an engine), full (embedded engines, import and export), cuda (the embedded
# engine of NVIDIA GPUs), triton (NVIDIA's).
#   docker build --target gateway -t policy-gateway .

ARG PYTHON=3.11.14-slim-bookworm
# Ubuntu 24.04, Python 3.12, CUDA 13.3, TensorRT 11.1, ONNX Runtime 1.27. Before 25.07, whoever reached Triton's HTTP port
# could run code there (CVE-2025-23310, CVE-2025-23319).
ARG TRITON=26.07-py3

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

FROM build AS build-cuda
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/policy/bin/pip install --constraint constraints.txt ".[gateway,onnx-cuda]"

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

FROM base AS cuda
COPY --from=build-cuda /opt/policy /opt/policy
# Of the driver, what computes and what nvidia-smi needs.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
CMD ["serve", "/bundles", "--engine", "onnx-cuda", "--host", "0.0.0.0"]

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
