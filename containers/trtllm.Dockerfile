# The engine's image: NGC's TensorRT-LLM 1.2.1, which brings `trtllm-serve`. Stages that call models run in it.
# Build in the project's root: docker build -f containers/trtllm.Dockerfile -t nemo-srl-engine .
FROM nvcr.io/nvidia/tensorrt-llm/release:1.2.1

COPY containers/engine.requirements.txt /opt/nemo_srl/containers/
RUN pip install --no-cache-dir --no-deps --requirement /opt/nemo_srl/containers/engine.requirements.txt

COPY pyproject.toml LICENSE README.md /opt/nemo_srl/
COPY nemo_srl /opt/nemo_srl/nemo_srl
COPY recipes /opt/nemo_srl/recipes
COPY conf /opt/nemo_srl/conf
COPY data /opt/nemo_srl/data
ENV PYTHONPATH=/opt/nemo_srl
WORKDIR /opt/nemo_srl

RUN command -v trtllm-serve \
 && python -c "import nemo_srl.worker, nemo_srl.launchers.services, nemo_srl.stages.candidates, nemo_srl.stages.judgements"
