"""Self-Rewarding Language Models on NeMo-Aligner, Megatron and TensorRT-LLM.

Start with `recipes/iterate.py`. It reads like the paper, and this package holds the parts that it uses.
"""

__version__ = "0.1.0"
