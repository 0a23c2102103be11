# Two images from one file: `api` (no torch, small) and `worker` (build argument ACCELERATOR: cpu or cuda).
ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    SATUNE_DATA_DIR=/data HF_HOME=/data/hub
RUN useradd --uid 10001 --create-home satune && mkdir /data && chown satune /data
WORKDIR /app

FROM base AS api
COPY requirements/api.lock requirements/
RUN pip install --require-hashes --no-deps -r requirements/api.lock
COPY pyproject.toml README.md LICENSE ./
COPY api api
COPY jobs jobs
COPY migrations migrations
COPY sat_core sat_core
COPY sat_io sat_io
ENV PYTHONPATH=/app
USER satune
EXPOSE 8000
CMD ["python", "-m", "uvicorn", "--factory", "api.app:create_app", "--host", "0.0.0.0", "--port", "8000", "--no-access-log", "--timeout-graceful-shutdown", "5"]

FROM base AS worker
ARG ACCELERATOR=cpu
COPY requirements/worker.lock requirements/torch-cuda.lock requirements/
RUN if [ "$ACCELERATOR" = cuda ]; then pip install --require-hashes --no-deps -r requirements/torch-cuda.lock; \
    else pip install --retries 0 --no-deps --extra-index-url https://download.pytorch.org/whl/cpu "torch==2.13.0+cpu"; fi
RUN pip install --require-hashes --no-deps -r requirements/worker.lock
COPY pyproject.toml README.md LICENSE ./
COPY jobs jobs
COPY worker worker
COPY sat_core sat_core
COPY sat_io sat_io
ENV PYTHONPATH=/app
USER satune
CMD ["python", "-m", "celery", "-A", "worker.app", "worker", "--pool", "threads", "--loglevel", "info", "--without-gossip", "--without-mingle"]
