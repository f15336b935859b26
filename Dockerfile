# mlfleet with mlflow, Kubernetes, uv and git, for Jobs that run projects and for services.
#
#   python -m build --wheel && docker build -t mlfleet .
#   docker run --rm -v "$PWD/my-project:/project" mlfleet run /project
#
# BASE must have Python 3.11 or newer with venv. git is installed by apt-get where the base lacks it.
ARG BASE=python:3.13-slim

FROM ${BASE} AS build
COPY dist /dist
# What is not in dist comes from the package index.
ARG PIP_NO_INDEX=
RUN python3 -m venv /opt/mlfleet \
    && /opt/mlfleet/bin/pip install --no-cache-dir --find-links /dist "mlfleet[mlflow,kubernetes]" uv

FROM ${BASE}
RUN command -v git >/dev/null \
    || (apt-get update && apt-get install -y --no-install-recommends git && rm -rf /var/lib/apt/lists/*)
COPY --from=build /opt/mlfleet /opt/mlfleet
ENV PATH=/opt/mlfleet/bin:$PATH
RUN useradd --create-home --uid 1000 mlfleet
USER mlfleet
WORKDIR /home/mlfleet
ENTRYPOINT ["mlfleet"]
CMD ["--help"]
