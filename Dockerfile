# mindiffedit on CPUs, as a server by default:
#
#     docker build -t mindiffedit .
#     docker run --rm -p 127.0.0.1:8000:8000 mindiffedit
#
# Other commands are arguments: docker run --rm -v "$PWD:/work" -w /work mindiffedit edit bowl.png ...

FROM python:3.11-slim-bookworm AS build
# g++ builds the C++ operators, which are left out without it.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY mindiffedit mindiffedit
RUN python -m venv /opt/mindiffedit \
    && /opt/mindiffedit/bin/pip install --no-cache-dir '.[serve]'

FROM python:3.11-slim-bookworm
# What the wheels of MindSpore and OpenCV link to.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgl1 libglib2.0-0 libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 mindiffedit \
    && install -d -o mindiffedit /var/cache/mindiffedit
COPY --from=build /opt/mindiffedit /opt/mindiffedit
# Compiled graphs and models of the hub, to be kept in a volume.
ENV PATH=/opt/mindiffedit/bin:$PATH \
    MINDIFFEDIT_CACHE=/var/cache/mindiffedit/graphs \
    HF_HOME=/var/cache/mindiffedit/hub
USER mindiffedit
WORKDIR /home/mindiffedit
VOLUME /var/cache/mindiffedit
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["mindiffedit"]
CMD ["serve", "--host", "0.0.0.0", "--warm-up", "128x128"]
