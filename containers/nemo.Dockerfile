# The trainer's image: NGC's NeMo 25.02, which brings NeMo-Aligner 0.7.0, Megatron-Core, Transformer Engine and Apex.
# Build in the project's root: docker build -f containers/nemo.Dockerfile -t nemo-srl-trainer .
FROM nvcr.io/nvidia/nemo:25.02

COPY containers/trainer.requirements.txt /opt/nemo_srl/containers/
# NGC's PyTorch images pin packages in a file that PIP_CONSTRAINT names, and pip refuses any other version.
RUN PIP_CONSTRAINT='' python -m pip install --no-cache-dir --no-deps \
    --requirement /opt/nemo_srl/containers/trainer.requirements.txt

# Under Slurm the checkout is mounted and comes first; this copy is for `docker run`.
COPY pyproject.toml LICENSE README.md /opt/nemo_srl/
COPY nemo_srl /opt/nemo_srl/nemo_srl
COPY recipes /opt/nemo_srl/recipes
COPY conf /opt/nemo_srl/conf
COPY data /opt/nemo_srl/data
# Before what the base itself has there, if anything: nothing of the base's may get lost.
ENV PYTHONPATH=/opt/nemo_srl${PYTHONPATH:+:$PYTHONPATH}
WORKDIR /opt/nemo_srl

# Fails the build, naming what is missing, where another base brings another stack. No import here may need a GPU.
RUN python -m nemo_srl.trainers.nemo_aligner.versions \
 && python -c "import nemo_srl.engines.openai, nemo_srl.experiment, nemo_srl.report, nemo_srl.stages.pairs, nemo_srl.worker"
