# The server with the embedded model, on the CPU: docker compose up --build. docs/server.md tells of keys and of CUDA.
FROM python:3.13-slim-bookworm

# An index with torch's builds for the CPU, a tenth of the size of those for CUDA; empty for PyPI, which has the latter.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

WORKDIR /app
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY beacon_memory beacon_memory
COPY integrations integrations
RUN pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
    '.[server,formats,mcp,postgres,remote]'

RUN useradd --create-home --uid 10001 memory && install -d -o memory -m 700 /data
USER 10001
# The embedded model comes into the image, so that a container needs no network.
RUN beacon-memory info

ENV BEACON_MEMORY_STORE=/data/store
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=10s --start-period=2m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready')"]
ENTRYPOINT ["beacon-memory"]
CMD ["serve", "--host", "0.0.0.0", "--api-keys", "/data/keys.json"]
