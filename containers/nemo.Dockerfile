# The trainer's image: NGC's NeMo 25.02, which has NeMo-Aligner 0.7.0, Megatron-Core, Transformer Engine and Apex.
# Build in the project's root: docker build -f containers/nemo.Dockerfile -t nemo-srl-trainer .
FROM nvcr.io/nvidia/nemo:25.02

COPY containers/trainer.requirements.txt /opt/nemo_srl/containers/
# PIP_CONSTRAINT names a file in which NGC's PyTorch images pin packages. With it, pip refuses any other version.
RUN PIP_CONSTRAINT='' python -m pip install --no-cache-dir --no-deps \
    --requirement /opt/nemo_srl/containers/trainer.requirements.txt

# `docker run` uses this copy. Under Slurm the checkout is mounted, and Python finds it first.
COPY pyproject.toml LICENSE README.md /opt/nemo_srl/
COPY nemo_srl /opt/nemo_srl/nemo_srl
COPY recipes /opt/nemo_srl/recipes
COPY conf /opt/nemo_srl/conf
COPY data /opt/nemo_srl/data
# The base may have a PYTHONPATH of its own. It must not be lost, so this one is put before it.
ENV PYTHONPATH=/opt/nemo_srl${PYTHONPATH:+:$PYTHONPATH}
WORKDIR /opt/nemo_srl

# If the base has another stack, or no Transformer Engine or Apex, this stops the build and names what is missing. No
# import here may need a GPU.
RUN python -m nemo_srl.trainers.nemo_aligner.versions ngc \
 && python -c "import nemo_srl.engines.openai, nemo_srl.experiment, nemo_srl.report, nemo_srl.stages.pairs, nemo_srl.worker"
