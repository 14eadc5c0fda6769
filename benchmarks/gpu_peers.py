"""What gpu.py compares with: TRL's DPOTrainer, and transformers' generation. `gpu_peers.py CASE_FILE RESULT_FILE`.

It imports nothing of this project, because TRL needs a newer transformers than NeMo.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from importlib import metadata, util
from pathlib import Path
from typing import Any


def dpo(case: dict[str, Any]) -> dict[str, Any]:
    """DPO by TRL: float32 weights under bfloat16 autocast (its default), and no recomputation of activations."""
    if util.find_spec("trl") is None:
        return {"left_out": "TRL is not installed. Give its folder as --trl-path"}
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    rows = json.loads(Path(case["pairs"]).read_text())["rows"][: case["num_pairs"]]
    on_gpu = case["device"] == "cuda"
    ends, losses = list[float](), list[float]()

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                losses.append(logs["loss"])

    args = DPOConfig(
        output_dir=case["work_dir"], use_cpu=not on_gpu, bf16=on_gpu, gradient_checkpointing=False,
        per_device_train_batch_size=case["micro_batch_size"],
        gradient_accumulation_steps=len(rows) // case["micro_batch_size"], max_steps=case["num_steps"],
        learning_rate=case["learning_rate"], lr_scheduler_type="constant", beta=0.1, adam_beta1=0.9, adam_beta2=0.98,
        weight_decay=0.0, max_grad_norm=1.0, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
        max_length=case["max_length"], precompute_ref_log_probs=case["precompute"],
    )  # fmt: skip
    try:
        trainer = DPOTrainer(
            model=case["model"], args=args, train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(case["model"]), callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    except torch.OutOfMemoryError as e:
        return {"left_out": f"the GPU's memory is too small for it: {e}"[:200]}
    return {
        "losses": losses,
        "step_seconds": [b - a for a, b in itertools.pairwise(ends)],
        "memory": {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        if on_gpu
        else None,
        "versions": versions("trl", "transformers"),
    }


def generation(case: dict[str, Any]) -> dict[str, Any]:
    """Tokens and seconds of each workload, by `generate` in static batches or by continuous batching."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(case["model"]).to(case["device"], torch.bfloat16).eval()
    if case["method"] == "continuous batching":
        if not hasattr(model, "generate_batch"):
            return {"left_out": f"transformers {metadata.version('transformers')} has no generate_batch"}
        run = continuous_batching
    else:
        run = static_batches
    found = {}
    for workload in json.loads(Path(case["workloads"]).read_text()):
        run(model, case, {**workload, "max_tokens": 2})  # warms up
        start = time.perf_counter()
        num_tokens = run(model, case, workload)
        found[workload["name"]] = {"num_tokens": num_tokens, "seconds": time.perf_counter() - start}
    return {"workloads": found, "versions": versions("transformers")}


def static_batches(model: Any, case: dict[str, Any], workload: dict[str, Any]) -> int:
    import hf_generate

    return hf_generate.generate(
        model, workload["prompts"], n=workload["n"], max_tokens=workload["max_tokens"], batch_size=case["batch_size"],
        temperature=case["temperature"], top_p=case["top_p"],
    )  # fmt: skip


def continuous_batching(model: Any, case: dict[str, Any], workload: dict[str, Any]) -> int:
    """Each call also makes the cache and the CUDA graphs."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    # Its cache takes what is free. On a GPU that is right. On a CPU it would take the memory of the whole machine.
    cache = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=512) if case["device"] == "cpu" else None
    config = GenerationConfig(
        max_new_tokens=workload["max_tokens"], do_sample=True, temperature=case["temperature"], top_p=case["top_p"],
        top_k=0, eos_token_id=case["unused_token"], pad_token_id=0,
    )  # fmt: skip
    sequences = [list(prompt) for prompt in workload["prompts"] for _ in range(workload["n"])]
    done = model.generate_batch(sequences, generation_config=config, continuous_batching_config=cache)
    num_tokens = sum(len(x.generated_tokens) for x in done.values())
    if num_tokens != len(sequences) * workload["max_tokens"]:
        sys.exit(f"generate_batch made {num_tokens} tokens instead of {len(sequences)} x {workload['max_tokens']}")
    return num_tokens


def versions(*names: str) -> dict[str, str]:
    return {name: metadata.version(name) for name in names}


if __name__ == "__main__":
    case = json.loads(Path(sys.argv[1]).read_text())
    found = (dpo if case["kind"] == "dpo" else generation)(case)
    Path(sys.argv[2]).write_text(json.dumps(found))
