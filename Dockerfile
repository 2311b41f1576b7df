# Each service's image has one target. Gateway and controller have no torch. BuildKit is not needed.
#   docker build --target gateway --tag helios-gateway .
# The base can be any image with Python 3.11, venv and pip: a Python image, or Debian bookworm with python3-venv.
ARG BASE_IMAGE=python:3.11-slim-bookworm

# Lists the packages to install. Other changes of pyproject.toml then do not install the packages again.
FROM ${BASE_IMAGE} AS requirements
COPY pyproject.toml /
RUN python3 -c 'import tomllib; \
project = tomllib.load(open("/pyproject.toml", "rb"))["project"]; \
engine = project["optional-dependencies"]["engine"]; \
torch = [one for one in engine if one.startswith("torch==")]; \
print(*project["dependencies"], sep="\n", file=open("/core.txt", "w")); \
print(*torch, sep="\n", file=open("/torch.txt", "w")); \
print(*engine, sep="\n", file=open("/engine.txt", "w"))'

FROM ${BASE_IMAGE} AS core-dependencies
# pip reads these variables. They are set only for networks without the public package index.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_CERT
RUN python3 -m venv /opt/helios
ENV PATH=/opt/helios/bin:$PATH
WORKDIR /build
# Copies the files of the folder `wheels`, so that pip finds them. The pattern allows the folder to be missing.
COPY LICENSE wheel[s] ./
COPY --from=requirements /core.txt ./
RUN pip install --no-cache-dir --find-links . --requirement core.txt

# Our own code has its own layer: it is small and changes often. The layer of dependencies is large and stays.
FROM core-dependencies AS code
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_CERT
COPY pyproject.toml README.md ./
COPY helios helios
COPY services services
RUN pip install --no-cache-dir --find-links . --no-deps --prefix /code .

FROM ${BASE_IMAGE} AS runtime
RUN useradd --uid 10001 --create-home helios
ENV PATH=/opt/helios/bin:$PATH \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /home/helios
STOPSIGNAL SIGTERM

FROM runtime AS core
COPY --from=core-dependencies /opt/helios /opt/helios
COPY --from=code /code /opt/helios

FROM core AS gateway
ENV HELIOS_GATEWAY_ADDRESS=0.0.0.0:50051 \
    HELIOS_TARGET=127.0.0.1:50051
EXPOSE 50051
HEALTHCHECK --interval=10s --timeout=8s --start-period=20s --retries=3 \
  CMD ["python", "-m", "helios.health", "127.0.0.1:50051"]
ENTRYPOINT ["python", "-m", "services.gateway"]

FROM core AS controller
ENV HELIOS_CONTROLLER_ADDRESS=0.0.0.0:50071
EXPOSE 50071
HEALTHCHECK --interval=10s --timeout=8s --start-period=20s --retries=3 \
  CMD ["python", "-m", "helios.health", "127.0.0.1:50071"]
ENTRYPOINT ["python", "-m", "services.controller"]

FROM core-dependencies AS engine-dependencies
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_CERT
# Where torch comes from. The package index's build for Linux contains CUDA (several GB). PyTorch's index of CPU
# builds makes a small image; its indexes of other CUDA versions or of ROCm make images for such devices.
ARG TORCH_INDEX_URL
COPY --from=requirements /torch.txt /engine.txt ./
RUN pip install --no-cache-dir --find-links . ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} \
    --requirement torch.txt
RUN pip install --no-cache-dir --find-links . --requirement engine.txt

# Compiles the kernels for every class of processors, so that no start of the image waits for a compiler.
FROM engine-dependencies AS kernels
COPY models /models
COPY --from=code /code /opt/helios
RUN HELIOS_KERNEL_CACHE_DIR=/kernels python -m helios.engine.precompile --all-targets --models-dir /models \
 && chmod -R a+rX /kernels

FROM runtime AS engine
COPY --from=engine-dependencies /opt/helios /opt/helios
COPY models /models
COPY --from=code /code /opt/helios
COPY --from=kernels /kernels /opt/helios/kernels
# No user can write to this folder. Code that is compiled later is kept with the rest of the cache.
ENV HELIOS_MODELS_DIR=/models \
    HELIOS_KERNEL_CACHE_DIR=/opt/helios/kernels \
    XDG_CACHE_HOME=/tmp/cache

FROM engine AS worker
ENV HELIOS_WORKER_ADDRESS=0.0.0.0:50061
EXPOSE 50061
# A large model takes longer to load. `docker run --health-start-period` sets a longer start period.
HEALTHCHECK --interval=10s --timeout=8s --start-period=120s --retries=3 \
  CMD ["python", "-m", "helios.health", "127.0.0.1:50061"]
ENTRYPOINT ["python", "-m", "services.worker"]

FROM engine AS profiler
ENV HELIOS_PROFILER_ADDRESS=0.0.0.0:50081
EXPOSE 50081
HEALTHCHECK --interval=10s --timeout=8s --start-period=120s --retries=3 \
  CMD ["python", "-m", "helios.health", "127.0.0.1:50081"]
ENTRYPOINT ["python", "-m", "services.profiler"]
