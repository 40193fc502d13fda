# Scope's images. What is made here is made from uv.lock and Debian's packages, and from nothing else.
#
#   docker build --tag scope-mesh .                             all programs: operator, registry, agent, scopectl
#   docker build --target wireguard --tag scope-wireguard .     user-space WireGuard and its supervisor alone
#
# `make image` does both, also where no image can be pulled: BASE_IMAGE may be any Debian, and BUILD_IMAGE, of which
# nothing is shipped, one that also knows the package indexes of the machine that builds.
#
# There is no ENTRYPOINT: each container names its program (docs/security.md says what each one may do).

ARG BASE_IMAGE=debian:bookworm-slim
ARG BUILD_IMAGE=${BASE_IMAGE}


FROM ${BASE_IMAGE} AS system
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# The same user as in other images without root, so that policies which name the number fit.
RUN apt-get update -q \
    && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends ca-certificates python3 \
    && groupadd --gid 65532 scope \
    && useradd --uid 65532 --gid 65532 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin scope \
    && find / -xdev -name __pycache__ -path '*/dist-packages/*' -prune -exec rm -rf {} + \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/cache/ldconfig/aux-cache /var/log/*


FROM system AS wireguard
LABEL org.opencontainers.image.title="scope-wireguard" \
    org.opencontainers.image.description="User-space WireGuard for Scope, where the kernel has none" \
    org.opencontainers.image.licenses="Apache-2.0 AND MIT" \
    org.opencontainers.image.version="1"
RUN apt-get update -q \
    && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends wireguard-go \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/cache/ldconfig/aux-cache /var/log/*
# These files and no others of ours: this image changes when they do, and not with the agent.
COPY scope/__init__.py scope/core_dumps.py /opt/scope/scope/
COPY nodeagent/scope_dataplane/__init__.py nodeagent/scope_dataplane/process.py nodeagent/scope_dataplane/wireguard.py \
    /opt/scope/scope_dataplane/
RUN python3 -m compileall -q --invalidation-mode unchecked-hash /opt/scope \
    && mkdir /opt/scope/bin \
    && printf '#!/bin/sh\nPYTHONPATH=/opt/scope exec python3 -P -m scope_dataplane.wireguard "$@"\n' >/opt/scope/bin/scope-wireguard \
    && chmod 755 /opt/scope/bin/scope-wireguard
ENV PATH=/opt/scope/bin:/usr/sbin:/usr/bin:/sbin:/bin
USER 65532:65532
CMD ["scope-wireguard", "--help"]


FROM ${BUILD_IMAGE} AS tools
RUN apt-get update -q \
    && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends ca-certificates python3 python3-venv
WORKDIR /build
COPY hack/uv.txt hack/
RUN python3 -m venv /uv \
    && /uv/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes --only-binary :all: -r hack/uv.txt
# Neither an index of this machine nor a cache has a say in what is installed: the hashes of the lock have.
ENV UV_NO_CACHE=1 UV_PYTHON_DOWNLOADS=never UV_LINK_MODE=copy


FROM tools AS locked
COPY pyproject.toml uv.lock ./
RUN /uv/bin/uv export --quiet --frozen --no-dev --no-emit-project --all-extras --output-file locked.txt


# A stage of its own, so that a change of pyproject.toml that locks nothing else leaves this layer as it was.
FROM tools AS dependencies
COPY --from=locked /build/locked.txt ./
RUN /uv/bin/uv venv --quiet --python /usr/bin/python3 /opt/scope \
    && /uv/bin/uv pip install --quiet --python /opt/scope --require-hashes --only-binary :all: -r locked.txt \
    && find /opt/scope -type d \( -name tests -o -name test \) -prune -exec rm -rf {} + \
    && rm -rf /opt/scope/bin/activate* /opt/scope/bin/deactivate* /opt/scope/bin/pydoc*
# The client for Kubernetes is there to read kubeconfigs. Its model of every object and every call, 75 MB that are
# loaded when one is named, is not asked for; that the rest loads without is tried at once.
RUN find /opt/scope/lib/python3*/site-packages/kubernetes \( -path '*/client/api/*' -o -path '*/client/models/*' \) \
        -type f ! -name __init__.py -delete \
    && /opt/scope/bin/python -c 'import kubernetes.aio as aio; aio.client.Configuration(); aio.config.load_kube_config'
# Bytecode that is believed without a look at its source: it does not depend on when it was made, and loads faster.
RUN python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/scope/lib


FROM dependencies AS project
COPY hack/image/hatchling.txt hack/image/
RUN /uv/bin/uv venv --quiet --python /usr/bin/python3 /hatchling \
    && /uv/bin/uv pip install --quiet --python /hatchling --require-hashes --only-binary :all: -r hack/image/hatchling.txt
COPY LICENSE pyproject.toml ./
COPY scope scope
COPY operator operator
COPY nodeagent nodeagent
# What this adds to the environment goes into a layer of its own: an upgrade brings few bytes.
RUN find /opt/scope | sort >/before \
    && PATH=/hatchling/bin:$PATH VIRTUAL_ENV=/hatchling /hatchling/bin/python -m hatchling build -t wheel -d /wheel \
    && /uv/bin/uv pip install --quiet --python /opt/scope --no-deps --no-index /wheel/*.whl \
    && python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/scope/lib \
    && find /opt/scope | sort | comm -13 /before - >/added \
    && mkdir /layer && tar -cf - --no-recursion -T /added | tar -xf - -C /layer \
    && cp LICENSE /layer/opt/scope/


FROM system AS scope
RUN apt-get update -q \
    && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends nftables wireguard-go \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/cache/ldconfig/aux-cache /var/log/*
COPY --from=dependencies /opt/scope /opt/scope
COPY --from=project /layer/ /
ARG VERSION=unknown
LABEL org.opencontainers.image.title="scope-mesh" \
    org.opencontainers.image.description="Scope: operator, registry, agent and scopectl of a WireGuard mesh" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}"
ENV PATH=/opt/scope/bin:/usr/sbin:/usr/bin:/sbin:/bin
USER 65532:65532
CMD ["scopectl", "--help"]
