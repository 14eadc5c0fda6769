"""Self-Rewarding Language Models on NeMo-Aligner, Megatron and TensorRT-LLM.

`recipes/iterate.py` is the entry point and reads like the paper; this package is what it stands on.
"""

__version__ = "0.1.0"
