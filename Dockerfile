# The image of the service. docs/deployment.md describes how to build and run it.
#
# Both stages have the same base, because the virtual environment links to its Python (3.11 or newer, with venv).
ARG BASE=python:3.13-slim-bookworm

# --- build: the wheel, and a virtual environment with hash-locked packages -------------------------------------------
FROM ${BASE} AS build
WORKDIR /build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore

# Two environments: the first has pip and the build backend, and only the second goes into the image.
RUN python3 -m venv tools && python3 -m venv --without-pip /opt/norce-adapter

# Requirements come before the code, because they change less often. A build secret named `pip` is used as pip.conf.
COPY requirements.txt requirements-build.txt ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    tools/bin/pip install --require-hashes -r requirements-build.txt \
    && tools/bin/pip --python /opt/norce-adapter/bin/python install --require-hashes -r requirements.txt

COPY pyproject.toml README.md LICENSE ./
COPY adapter adapter
RUN tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir dist . \
    && tools/bin/pip --python /opt/norce-adapter/bin/python install --no-deps --no-index dist/*.whl \
    && /opt/norce-adapter/bin/norce-adapter version

# --- run -------------------------------------------------------------------------------------------------------------
FROM ${BASE}

# A fixed number, so that the owner of a volume stays the same and Kubernetes can check that it is not root.
RUN groupadd --gid 10001 norce-adapter \
    && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /data --shell /usr/sbin/nologin \
        norce-adapter \
    && install -d -o 10001 -g 10001 -m 0700 /data

COPY --from=build /opt/norce-adapter /opt/norce-adapter

# The installation has written the bytecode. From here on, only /data is written.
ENV PATH=/opt/norce-adapter/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    NORCE_ADAPTER_CONFIG=/etc/norce-adapter/config.yaml \
    NORCE_ADAPTER_STORE_URL=sqlite:////data/adapter.db

# The defaults of `store.url` and `operations.socket` are relative to this folder, so they are in the volume.
WORKDIR /
VOLUME /data
USER 10001:10001
EXPOSE 8080 8081
STOPSIGNAL SIGTERM

# http.client uses no proxy. If you change `operations.port`, change this as well.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-Ic", "import http.client, sys; c = http.client.HTTPConnection('127.0.0.1', 8081, timeout=3); c.request('GET', '/readyz'); sys.exit(c.getresponse().status != 200)"]

ENTRYPOINT ["norce-adapter"]
CMD ["serve"]

ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="norce-adapter" \
      org.opencontainers.image.description="An order adapter behind Norce Checkout" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
