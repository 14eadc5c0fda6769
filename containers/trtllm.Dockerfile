# The engine's image: NGC's TensorRT-LLM 1.2.1, which has `trtllm-serve`. Stages that call models run in it.
# Build in the project's root: docker build -f containers/trtllm.Dockerfile -t nemo-srl-engine .
# It stays 1.2.1 until 1.3 is stable: in the image of 1.3.0rc27, `trtllm-serve` fails when it spawns its workers.
FROM nvcr.io/nvidia/tensorrt-llm/release:1.2.1

COPY containers/engine.requirements.txt /opt/nemo_srl/containers/
# PIP_CONSTRAINT names a file in which NGC's PyTorch images pin packages. With it, pip refuses any other version.
RUN PIP_CONSTRAINT='' python -m pip install --no-cache-dir --no-deps \
    --requirement /opt/nemo_srl/containers/engine.requirements.txt

# `docker run` uses this copy. Under Slurm the checkout is mounted, and Python finds it first.
COPY pyproject.toml LICENSE README.md /opt/nemo_srl/
COPY nemo_srl /opt/nemo_srl/nemo_srl
COPY recipes /opt/nemo_srl/recipes
COPY conf /opt/nemo_srl/conf
COPY data /opt/nemo_srl/data
# The base may have a PYTHONPATH of its own. It must not be lost, so this one is put before it.
ENV PYTHONPATH=/opt/nemo_srl${PYTHONPATH:+:$PYTHONPATH}
WORKDIR /opt/nemo_srl

# If the base has no such program, this stops the build. No import here may need a GPU.
RUN command -v trtllm-serve \
 && python -c "import nemo_srl.engines.trtllm, nemo_srl.launchers.with_services, nemo_srl.stages.judgements, nemo_srl.worker"
