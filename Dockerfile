# The lessons in JupyterLab, on a CPU. docs/platforms.md explains both commands:
#   docker build --tag nano-vllm-course .
#   docker run --interactive --tty --name lessons --publish 127.0.0.1:8888:8888 nano-vllm-course
ARG PYTHON=3.12
FROM python:${PYTHON}-slim-bookworm

# make is the only package that the base image lacks. Debian keeps just its newest version, so a
# pinned version would stop the build as soon as Debian publishes the next one.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --shell /bin/bash learner \
    && install --directory --owner=learner --group=learner /home/learner/nano-vllm-course

USER learner
WORKDIR /home/learner/nano-vllm-course
COPY --chown=learner:learner . .

# A terminal in JupyterLab then knows `course` and the Python of the lessons.
ENV PATH=/home/learner/nano-vllm-course/.venv/bin:$PATH
RUN PIP_NO_CACHE_DIR=1 make install PYTHON=python3 TORCH=cpu && course doctor

# A container has an address of its own, so JupyterLab must listen on all of the container's
# addresses. Its token stays on, and the port is published to this machine alone (see above).
EXPOSE 8888
CMD ["python", "-m", "jupyterlab", "--ip=0.0.0.0", "--no-browser"]
