# An image that trains and serves. All data is in the volume /data. For a CUDA build of torch:
#   docker build --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cu130 .
FROM python:3.12-slim AS build
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
COPY . /source
RUN PIP_NO_CACHE_DIR=1 TORCH_INDEX_URL="$TORCH_INDEX_URL" /source/docker/install.sh /opt/sage

FROM python:3.12-slim
# SAGE compiles its CPU kernels on first use.
RUN apt-get update \
  && apt-get install --yes --no-install-recommends gcc libc6-dev libgomp1 \
  && rm -rf /var/lib/apt/lists/* \
  && useradd --uid 1000 --create-home sage \
  && install --directory --owner sage --group sage --mode 700 /data
COPY --from=build /opt/sage /opt/sage
ENV PATH=/opt/sage/bin:$PATH \
  SAGE_HOME=/data \
  SAGE_GATEWAY_HOST=0.0.0.0 \
  SAGE_RESTART_POLICY=unless-stopped \
  HF_HOME=/data/cache/huggingface
USER sage
WORKDIR /data
VOLUME /data
EXPOSE 8889
HEALTHCHECK --start-period=30s --interval=15s --timeout=10s CMD ["sage", "gateway", "status"]
CMD ["python", "-m", "sage.llm.gateway"]
