# modelfs with the stores that need a library of their own. It mounts, so it runs as root:
#
#   docker run --rm --device /dev/fuse --cap-add SYS_ADMIN --security-opt apparmor=unconfined --pid host \
#     -v /var/cache/modelfs:/var/cache/modelfs \
#     --mount type=bind,source=/var/lib/modelfs,target=/var/lib/modelfs,bind-propagation=rshared modelfs
#
# All Python packages that it needs, and their versions, are in packaging/container/constraints.txt.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# Debian removes superseded versions from its mirrors: naming them would break the build with the next fix.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev libfuse3-dev pkg-config \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv --without-pip /opt/modelfs
WORKDIR /src
# Before the source: a change of that does not install them anew.
COPY packaging/container/constraints.txt ./
RUN pip --python /opt/modelfs/bin/python install --no-cache-dir --no-deps --requirement constraints.txt
COPY pyproject.toml README.md LICENSE ./
COPY modelfs modelfs
RUN pip --python /opt/modelfs/bin/python install --no-cache-dir --no-deps . \
    && pip --python /opt/modelfs/bin/python check

FROM ${PYTHON_IMAGE}
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="modelfs" \
      org.opencontainers.image.description="Remote model stores as a local, read-only directory, cached on the node" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libfuse3-3 \
    && rm -rf /var/lib/apt/lists/* \
    && mkdir -p /var/lib/modelfs
COPY --from=build /opt/modelfs /opt/modelfs
COPY --chmod=0755 packaging/container/modelfs-node packaging/container/modelfs-untaint /usr/local/bin/
ENV PATH=/opt/modelfs/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    MODELFS_MOUNTPOINT=/var/lib/modelfs/models
HEALTHCHECK --interval=30s --timeout=15s --start-period=10m --retries=3 \
    CMD ["modelfs-node", "ready"]
CMD ["modelfs-node", "mount"]
