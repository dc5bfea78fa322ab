# The images. `server` and `client` are small and hold no torch and no compiler; `train` trains and exports models.
#
#   docker build --target server .                          the server, on the CPU
#   docker build --target server --build-arg VARIANT=gpu .  with ONNX Runtime for CUDA and the CUDA libraries it needs
#   docker build --target client .                          the Python client and demo.py
#   docker build --target inspector .                       the inspector's page, over a server that runs elsewhere
#   docker build --target train .                           torch, and g++ for torch.compile
#
# pip's own variables are taken as build arguments: PIP_EXTRA_INDEX_URL names PyTorch's index of CPU builds, for a
# `train` image without CUDA.
#
# What `server`, `client` and `inspector` install is held to the hashes in requirements/, which `make lock` writes. `train`
# is held to the versions in constraints.txt alone, as each of PyTorch's indexes has builds of its own. The base goes by
# its tag: put @sha256:DIGEST behind it, as your registry tells it, to have the same bytes each time.

FROM python:3.11-slim-bookworm AS base
# gRPC's own log is not for users; and ONNX Runtime reports its use to its maker unless told not to.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 GRPC_VERBOSITY=NONE ORT_DISABLE_TELEMETRY=1
LABEL org.opencontainers.image.title="ntm" \
      org.opencontainers.image.description="Train, export and serve Neural Turing Machines and other step-wise models" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="0.2.0"
# A fixed number, so that volumes keep their owner when the image is built again.
RUN groupadd --system --gid 10001 ntm \
    && useradd --system --uid 10001 --gid ntm --no-create-home --home-dir / ntm \
    && install --directory --owner ntm --group ntm /data


# Everything below is installed into /opt/venv without pip, which the images do not need. Dependencies come first and
# our own code after them, so that a change of the code builds in seconds. What builds our code stays outside of it.
FROM base AS build
ARG PIP_EXTRA_INDEX_URL
ARG PIP_INDEX_URL
WORKDIR /src
RUN python -m venv --without-pip /opt/venv
COPY requirements requirements
RUN --mount=type=cache,target=/root/.cache/pip pip install --require-hashes --requirement requirements/build.txt
COPY pyproject.toml constraints.txt ./
COPY clients/python/pyproject.toml clients/python/
# Empty stand-ins for the packages and files that the pyproject.tomls name.
RUN touch README.md clients/python/README.md \
    && python -c 'import pathlib, tomllib; [(at / package.replace(".", "/")).mkdir(parents=True, exist_ok=True) \
        for at in map(pathlib.Path, (".", "clients/python")) \
        for package in tomllib.loads((at / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]]'


FROM build AS build-server
ARG VARIANT=cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    case "$VARIANT" in \
        cpu) requirements=server ;; \
        gpu) requirements=gpu ;; \
        *) echo "VARIANT is cpu or gpu, not $VARIANT" >&2; exit 1 ;; \
    esac \
    && pip --python /opt/venv/bin/python install --require-hashes --requirement "requirements/$requirements.txt"
# What is imported neither by the server nor by what it imports: test suites, what compilers and type checkers read,
# tools for making other models, and ONNX Runtime's library for C programs, which its Python module holds a copy of.
RUN packages=/opt/venv/lib/python3.11/site-packages \
    && rm -rf $packages/onnx/reference $packages/onnxruntime/transformers $packages/onnxruntime/quantization \
        $packages/onnxruntime/tools $packages/onnxruntime/capi/libonnxruntime.so* $packages/numpy/f2py \
        $packages/numpy/distutils \
    && find $packages -type d \( -name tests -o -name test \) -prune -exec rm -rf {} + \
    && find $packages -type f \( -name '*.pyi' -o -name '*.h' -o -name '*.hpp' -o -name '*.a' \) -delete
COPY clients clients
COPY server server
RUN --mount=type=cache,target=/root/.cache/pip \
    pip wheel --no-index --no-deps --no-build-isolation --wheel-dir /wheels ./clients/python . \
    && pip --python /opt/venv/bin/python install --no-index --no-deps /wheels/*.whl


FROM build AS build-client
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/venv/bin/python install --require-hashes --requirement requirements/client.txt
COPY clients clients
RUN --mount=type=cache,target=/root/.cache/pip \
    pip wheel --no-index --no-deps --no-build-isolation --wheel-dir /wheels ./clients/python \
    && pip --python /opt/venv/bin/python install --no-index --no-deps /wheels/*.whl


FROM build AS build-inspector
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/venv/bin/python install --require-hashes --requirement requirements/inspector.txt
COPY clients clients
COPY inspector inspector
RUN --mount=type=cache,target=/root/.cache/pip \
    pip wheel --no-index --no-deps --no-build-isolation --wheel-dir /wheels ./clients/python . \
    && pip --python /opt/venv/bin/python install --no-index --no-deps /wheels/*.whl


FROM build AS build-train
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/venv/bin/python install --constraint constraints.txt ./clients/python '.[export]'
COPY clients clients
COPY export export
COPY training training
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/venv/bin/python install --no-deps --force-reinstall ./clients/python .


FROM base AS train
# torch.compile writes C++ and has g++ build it. Its version is Debian's, which keeps one at a time.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build-train /opt/venv /opt/venv
# Whoever runs it: a job writes models as the owner of the directory that is mounted.
RUN install --directory --mode 1777 /ntm/runs /ntm/models
WORKDIR /ntm
ENV HOME=/tmp MPLCONFIGDIR=/tmp TORCHINDUCTOR_CACHE_DIR=/tmp/inductor
USER 10001:10001
ENTRYPOINT ["python", "-m"]
CMD ["training", "--help"]


FROM base AS client
COPY --from=build-client /opt/venv /opt/venv
COPY demo.py /app/demo.py
WORKDIR /app
USER 10001:10001
ENTRYPOINT ["python", "demo.py"]
CMD ["--help"]


FROM base AS inspector
COPY --from=build-inspector /opt/venv /opt/venv
USER 10001:10001
WORKDIR /
EXPOSE 8050
ENTRYPOINT ["python", "-m", "inspector"]
CMD ["--help"]


FROM base AS server
COPY --from=build-server /opt/venv /opt/venv
COPY models /models
USER 10001:10001
WORKDIR /
ENV NTM_SERVER_MODELS=/models \
    NTM_SERVER_LISTEN=0.0.0.0:50051 \
    NTM_SERVER_METRICS_LISTEN=0.0.0.0:9464 \
    NTM_SERVER_HEALTH_LISTEN=0.0.0.0:50050 \
    NTM_SERVER_LOG_FORMAT=json \
    NTM_SERVER_STORE=sqlite:////data/sessions.sqlite3
# 50050 tells health alone, in plaintext; the others want NTM_SERVER_TLS_CERT and _KEY, or NTM_SERVER_INSECURE.
EXPOSE 50050 50051 9464
VOLUME /data
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --start-interval=1s --retries=2 \
    CMD ["python", "-m", "server.rpc.health"]
ENTRYPOINT ["python", "-m", "server"]
