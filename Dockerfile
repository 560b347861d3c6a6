# The service as an image: docs/deployment.md says how to build and run it.
#
# Both stages stand on the same base, because the virtual environment links to its Python (3.11 or newer, with venv).
ARG BASE=python:3.13-slim-bookworm

# --- the wheel, and a virtual environment with nothing in it that was not locked by its hash -------------------------
FROM ${BASE} AS build
WORKDIR /build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore

# Two environments: pip and the build backend stay behind in the first, the second is what the service runs in.
RUN python3 -m venv tools && python3 -m venv --without-pip /opt/norce-adapter

# The requirements before the code: they change less often. A secret named `pip` is a pip.conf for this build alone.
COPY requirements.txt requirements-build.txt ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    tools/bin/pip install --require-hashes -r requirements-build.txt \
    && tools/bin/pip --python /opt/norce-adapter/bin/python install --require-hashes -r requirements.txt

COPY pyproject.toml README.md LICENSE ./
COPY adapter adapter
RUN tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir dist . \
    && tools/bin/pip --python /opt/norce-adapter/bin/python install --no-deps --no-index dist/*.whl \
    && /opt/norce-adapter/bin/norce-adapter version

# --- what runs -------------------------------------------------------------------------------------------------------
FROM ${BASE}

# A number, so that a volume's owner stays the same from image to image and Kubernetes sees that it is not root.
RUN groupadd --gid 10001 norce-adapter \
    && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /data --shell /usr/sbin/nologin \
        norce-adapter \
    && install -d -o 10001 -g 10001 -m 0700 /data

COPY --from=build /opt/norce-adapter /opt/norce-adapter

# The bytecode was written when the packages were installed; nothing but /data is written from here on.
ENV PATH=/opt/norce-adapter/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    NORCE_ADAPTER_CONFIG=/etc/norce-adapter/config.yaml \
    NORCE_ADAPTER_STORE_URL=sqlite:////data/adapter.db

# From here the default of `store.url`, data/adapter.db, lies in the volume as well.
WORKDIR /
VOLUME /data
USER 10001:10001
EXPOSE 8080 8081
STOPSIGNAL SIGTERM

# By http.client, which asks no proxy. Whoever moves `operations.port` moves this as well.
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
