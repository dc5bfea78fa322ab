# The server, without torch: models are mounted or baked in at /models.
FROM python:3.11-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md ./
COPY protos protos
COPY server server
RUN mkdir client export training training/model training/tasks \
    && python -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --constraint constraints.txt '.[server]'

FROM python:3.11-slim-bookworm AS server
COPY --from=build /opt/venv /opt/venv
COPY models /models
RUN useradd --system --uid 10001 ntm && install --directory --owner ntm /data
USER ntm
WORKDIR /
EXPOSE 50051
ENV PATH=/opt/venv/bin:$PATH NTM_SERVER_MODELS=/models NTM_SERVER_LISTEN=0.0.0.0:50051 NTM_SERVER_LOG_FORMAT=json \
    NTM_SERVER_STORE=sqlite:////data/sessions.sqlite3
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --start-interval=1s CMD ["python", "-m", "server.health"]
ENTRYPOINT ["python", "-m", "server"]
