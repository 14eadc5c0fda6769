# The engine's image: NGC's TensorRT-LLM 1.2.1, which brings `trtllm-serve`. Stages that call models run in it.
# Build in the project's root: docker build -f containers/trtllm.Dockerfile -t nemo-srl-engine .
FROM nvcr.io/nvidia/tensorrt-llm/release:1.2.1

COPY containers/engine.requirements.txt /opt/nemo_srl/containers/
# NGC's PyTorch images pin packages in a file that PIP_CONSTRAINT names, and pip refuses any other version.
RUN PIP_CONSTRAINT='' python -m pip install --no-cache-dir --no-deps \
    --requirement /opt/nemo_srl/containers/engine.requirements.txt

# Under Slurm the checkout is mounted and comes first; this copy is for `docker run`.
COPY pyproject.toml LICENSE README.md /opt/nemo_srl/
COPY nemo_srl /opt/nemo_srl/nemo_srl
COPY recipes /opt/nemo_srl/recipes
COPY conf /opt/nemo_srl/conf
COPY data /opt/nemo_srl/data
# Before what the base itself has there, if anything: nothing of the base's may get lost.
ENV PYTHONPATH=/opt/nemo_srl${PYTHONPATH:+:$PYTHONPATH}
WORKDIR /opt/nemo_srl

# Fails the build where another base brings another program. No import here may need a GPU.
RUN command -v trtllm-serve \
 && python -c "import nemo_srl.engines.trtllm, nemo_srl.launchers.with_services, nemo_srl.stages.judgements, nemo_srl.worker"
