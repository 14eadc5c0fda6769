"""The whole NeMo-Aligner configuration as a pure function of our settings, the model and the data.

Everything is decided here, before anything runs. `feasibility.py` refuses what NeMo-Aligner would notice after
minutes of start-up, in the middle of the training, or never. Needs neither NeMo nor torch.

The result is the tree of NeMo-Aligner's `examples/nlp/gpt/conf/gpt_{sft,dpo}.yaml` merged with the model's
part of NeMo's `megatron_gpt_config.yaml`. Paths in it are relative to the work directory. It describes a
training on GPUs with Transformer Engine. A platform's `adapt_plan` changes what a
machine without them needs otherwise.

Does not cover: fp8, packed sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nemo_srl.config.training import DPOConfig, OptimConfig
from nemo_srl.errors import ConfigError
from nemo_srl.models import families
from nemo_srl.models.spec import ModelSpec
from nemo_srl.trainers.nemo_aligner import feasibility, losses
from nemo_srl.trainers.nemo_aligner.data import DataStatistics
from nemo_srl.trainers.nemo_aligner.settings import NemoAlignerSettings

PLAN_FILE = "plan.yaml"
START_DIR = "start"
"""The starting weights: an extracted .nemo (`model_config.yaml`, `model_weights/`)."""
REFERENCE_DIR = "reference"
"""DPO's reference log-probabilities (`reference.py`)."""
NEMO_DIR = "nemo"
"""NeMo's log directory, with `checkpoints/` below it."""
TOKENIZER_DIR = "start/tokenizer"


def check_plan(trainer: NemoAlignerSettings, optims: Sequence[OptimConfig], spec: ModelSpec) -> None:
    """Raise `ConfigError` for settings with which one of these trainings could not start, whatever the data is."""
    for optim in optims:
        make_plan(optim, trainer, seed=1, spec=spec, train=DataStatistics(num_rows=optim.global_batch_size))


def make_plan(
    optim: OptimConfig, trainer: NemoAlignerSettings, *, seed: int, spec: ModelSpec, train: DataStatistics
) -> dict[str, Any]:
    """The configuration to train with: DPO for a `DPOConfig`, SFT for any other.

    Its sections are `trainer`, `exp_manager`, `model` (NeMo's), `num_frozen_layers` and `num_steps`, the number of
    optimizer steps that the learning-rate schedule was computed from. Raises `ConfigError`.
    """
    section = "dpo" if isinstance(optim, DPOConfig) else "sft"
    feasibility.check(optim, trainer, spec=spec, train=train)
    num_steps = train.num_rows // optim.global_batch_size * optim.max_epochs
    return {
        "num_steps": num_steps,
        "num_frozen_layers": trainer.num_frozen_layers(spec.num_layers),
        "trainer": _trainer_section(section, optim, trainer, num_steps),
        "exp_manager": _exp_manager_section(section, trainer),
        "model": _model_section(section, optim, trainer, seed=seed, spec=spec, num_steps=num_steps),
    }


def _trainer_section(section: str, optim: OptimConfig, trainer: NemoAlignerSettings, num_steps: int) -> dict[str, Any]:
    interval = min(optim.save_interval, num_steps)
    # `mcore_distributed_optim` clips by Lightning's own setting and never reads the algorithm's. It computes the norm,
    # which is logged, only when it clips. So "no clipping" is a bound of infinity.
    clip = optim.gradient_clip_val if optim.gradient_clip_val > 0 else math.inf
    return {
        "num_nodes": trainer.num_nodes,
        "devices": trainer.num_ranks_per_node,
        "accelerator": "gpu",
        "precision": "32" if trainer.precision == "32" else "bf16",
        "logger": False,
        "enable_checkpointing": False,
        "use_distributed_sampler": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_time": None,
        "max_epochs": optim.max_epochs,
        "max_steps": num_steps,
        "gradient_clip_val": clip,
        section: {
            "max_epochs": optim.max_epochs,
            "max_steps": num_steps,
            "val_check_interval": interval,
            "save_interval": interval,
            "limit_train_batches": 1.0,
            "limit_val_batches": 0,  # no validation: the judge and the held-out prompts measure the model
            "gradient_clip_val": clip,
        },
    }


def _exp_manager_section(section: str, trainer: NemoAlignerSettings) -> dict[str, Any]:
    return {
        "explicit_log_dir": NEMO_DIR,
        "exp_dir": None,
        "name": section,
        "max_time_per_run": None,
        # It saves at SIGTERM in hooks that NeMo-Aligner's loops never call. `stopping.py` does it instead.
        "create_preemption_callback": False,
        "create_tensorboard_logger": False,
        "create_wandb_logger": False,
        "log_step_timing": False,
        "log_tflops_per_sec_per_gpu": False,
        "log_global_rank_0_only": True,
        "seconds_to_sleep": 0,
        "resume_if_exists": True,
        "resume_ignore_no_checkpoint": True,
        "create_checkpoint_callback": True,
        "checkpoint_callback_params": {
            # Only the last checkpoint is needed. A training that was interrupted goes on from it.
            "monitor": "step",
            "mode": "max",
            "save_top_k": 0,
            "save_last": True,
            "always_save_nemo": False,
            "save_nemo_on_train_end": False,
            "save_best_model": False,
            "filename": section + "--{step}-{consumed_samples}-{epoch}",
            "model_parallel_size": trainer.tensor_model_parallel_size * trainer.pipeline_model_parallel_size,
        },
    }


def _model_section(
    section: str, optim: OptimConfig, trainer: NemoAlignerSettings, *, seed: int, spec: ModelSpec, num_steps: int
) -> dict[str, Any]:
    tp = trainer.tensor_model_parallel_size
    rows_per_rank = -(-spec.vocab_size // tp)
    model = {
        "mcore_gpt": True,
        "seed": seed,
        "precision": "32" if trainer.precision == "32" else "bf16",
        # O2: bfloat16 weights, with float32 masters in the optimizer. Without O2, weights stay float32 and only the
        # products are bfloat16. At a learning rate of 1e-6 a bfloat16 weight would hardly change.
        "megatron_amp_O2": trainer.precision == "bf16-O2",
        "micro_batch_size": trainer.rows_at_a_time(optim),
        "global_batch_size": optim.global_batch_size,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": trainer.pipeline_model_parallel_size,
        "context_parallel_size": trainer.context_parallel_size,
        "sequence_parallel": trainer.sequence_parallel,
        **({"ub_tp_comm_overlap": True} if trainer.ub_tp_comm_overlap else {}),
        **_architecture(optim, spec),
        # The largest divisor up to 128 without needless padding. NeMo's softmax includes padded rows, each as exp(0).
        # With padding it would train another model than the one that is served. Llama 3 has 128256 / 8 = 16032 rows on
        # each of 8 ranks, so its divisor is 32; with 128 there would be 768 rows of zeros.
        "make_vocab_size_divisible_by": math.gcd(128, rows_per_rank),
        # From the model, not from the tokenizer, whose vocabulary may be smaller.
        "override_vocab_size": rows_per_rank * tp,
        "tokenizer": {"library": "huggingface", "type": TOKENIZER_DIR, "use_fast": True},
        # Transformer Engine's `_extra_state` is missing from checkpoints that were written without it.
        "dist_ckpt_format": "torch_dist",
        "dist_ckpt_load_strictness": "log_all",
        "transformer_engine": True,
        "gradient_as_bucket_view": True,
        **_recomputation(trainer),
        "peft": _peft_section(trainer),
        "optim": _optim_section(optim, trainer, num_steps=num_steps),
        "data": _data_section(section, optim, trainer),
    }
    if isinstance(optim, DPOConfig):
        model["dpo"] = {
            # The same as in training. Otherwise policy and reference would differ by rounding at step 1.
            "log_prob_forward_micro_batch_size": trainer.rows_at_a_time(optim),
            "ref_policy_kl_penalty": optim.beta,
            "preference_average_log_probs": optim.preference_loss in losses.LENGTH_NORMALIZED,
            "sft_average_log_probs": True,
            "gt_reward_scale": 1.0,
            "preference_loss": optim.preference_loss,  # `session.py` installs it from here
            **{name: getattr(optim, name) for name in losses.SETTINGS},
            "preference_loss_weight": 1.0,
            "sft_loss_weight": optim.sft_loss_weight,
        }
    return model


def _recomputation(trainer: NemoAlignerSettings) -> dict[str, Any]:
    granularity = trainer.recompute_granularity
    full = granularity == "full"
    return {
        "activations_checkpoint_granularity": None if granularity == "none" else granularity,
        # Every layer for itself, so that at most one of them is in memory.
        "activations_checkpoint_method": "uniform" if full else None,
        "activations_checkpoint_num_layers": 1 if full else None,
    }


def _peft_section(trainer: NemoAlignerSettings) -> dict[str, Any]:
    if not trainer.lora_rank:
        return {"peft_scheme": "none", "restore_from_path": None}
    return {
        "peft_scheme": "lora",
        "restore_from_path": None,
        "lora_tuning": {
            "target_modules": ["all"],
            "adapter_dim": trainer.lora_rank,
            "alpha": trainer.lora_alpha,
            "adapter_dropout": 0.0,
            "column_init_method": "zero",  # `lora.py` initialises, so that every parallel layout gets the same numbers
            "row_init_method": "zero",
            "layer_selection": None,
            "weight_tying": False,
        },
    }


def _architecture(optim: OptimConfig, spec: ModelSpec) -> dict[str, Any]:
    """The model in the words of NeMo's `megatron_gpt_config.yaml`: a Llama, and what the family changes of it."""
    family = families.of(spec)
    return {
        "encoder_seq_length": optim.max_seq_length,
        "max_position_embeddings": spec.max_position_embeddings,
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "ffn_hidden_size": spec.ffn_hidden_size,
        "num_attention_heads": spec.num_attention_heads,
        "num_query_groups": spec.num_query_groups,
        "kv_channels": spec.head_dim,
        "normalization": "rmsnorm",
        "layernorm_epsilon": spec.rms_norm_eps,
        "activation": "fast-swiglu",
        "bias": False,
        "qkv_bias": bool(family.q_bias),
        **({"qk_layernorm": True} if family.q_norm else {}),
        "share_embeddings_and_output_weights": spec.tie_word_embeddings,
        "position_embedding_type": "rope",
        "rotary_percentage": 1.0,
        "rotary_base": spec.rope_theta,
        **_rope_scaling(spec),
        "hidden_dropout": optim.hidden_dropout,
        "attention_dropout": optim.attention_dropout,
        "ffn_dropout": 0.0,
        "init_method_std": 0.02,
        "use_scaled_init_method": True,
        "apply_query_key_layer_scaling": False,
        "attention_softmax_in_fp32": False,
        "bias_activation_fusion": True,
        "bias_dropout_add_fusion": True,
        "masked_softmax_fusion": True,
        "apply_rope_fusion": True,
        "gradient_accumulation_fusion": False,
        "get_attention_mask_from_fusion": True,
        **family.nemo_settings,
    }


def _rope_scaling(spec: ModelSpec) -> dict[str, Any]:
    """Hugging Face's `rope_scaling` in NeMo's words. Refuses a type that NeMo 2.2 does not have."""
    scaling = spec.rope_scaling or {}
    if spec.rope_type in ("default", "linear"):
        factor = scaling["factor"] if spec.rope_type == "linear" else None
        return {"seq_len_interpolation_factor": factor, "scale_positional_embedding": False}
    if spec.rope_type == "llama3":
        return {
            "seq_len_interpolation_factor": None,
            "scale_positional_embedding": True,
            "scale_factor": scaling["factor"],
            "low_freq_factor": scaling["low_freq_factor"],
            "high_freq_factor": scaling["high_freq_factor"],
            "old_context_len": scaling["original_max_position_embeddings"],
        }
    raise ConfigError(
        f"rope_scaling.rope_type={spec.rope_type!r} in the model's config.json: NeMo 2.2 has no such scaling of the "
        "rotary embedding, and a training with another scaling would make another model. Use a model without scaling, "
        "or with linear and llama3, the types that NeMo has."
    )


def _optim_section(optim: OptimConfig, trainer: NemoAlignerSettings, *, num_steps: int) -> dict[str, Any]:
    return {
        # Megatron-core's own. The checkpoints of Apex's `distributed_fused_adam` depend on the parallel layout.
        "name": "mcore_distributed_optim",
        "lr": optim.learning_rate,
        "weight_decay": optim.weight_decay,
        "betas": [optim.adam_beta1, optim.adam_beta2],
        "overlap_grad_sync": trainer.overlap_grad_reduce,
        "overlap_param_sync": trainer.overlap_param_gather,
        "grad_sync_dtype": "fp32",
        # Ours, not NeMo's: the platforms `cpu` and `cuda` read it.
        **({"optimizer_cpu_offload": True} if trainer.optimizer_cpu_offload else {}),
        "sched": {
            "name": "CosineAnnealing",
            # Upstream has constant_steps of 1000. With that, a short run would fall to min_lr right after its
            # warm-up, and its first step would have a learning rate of 0.
            "warmup_steps": int(optim.warmup_fraction * num_steps),
            "constant_steps": 0,
            # The schedule counts from 0, so the last step is number num_steps - 1.
            "max_steps": max(1, num_steps - 1),
            "min_lr": optim.min_learning_rate,
        },
    }


def _length_multiple(trainer: NemoAlignerSettings) -> int:
    """Sequence parallelism cuts sequences by rank, and context parallelism into two parts by rank. Tensor cores are
    fastest with multiples of 16.
    """
    in_tensor_ranks = 8 * trainer.tensor_model_parallel_size if trainer.sequence_parallel else 16
    return trainer.context_parallel_size * in_tensor_ranks


def fixed_length(optim: OptimConfig, trainer: NemoAlignerSettings) -> int | None:
    """The length to which every sequence is padded. None: micro-batches have lengths of their own.

    The kernels of `ub_tp_comm_overlap` work on whole buffers, whatever is in them. Their size is set once, when the
    training starts (Transformer Engine 2.0, `CommOverlapBase::split_overlap_rs`). No row is longer than
    `max_seq_length`, so a multiple of that length, rounded up, is one length for all.
    """
    multiple = _length_multiple(trainer)
    return -(-optim.max_seq_length // multiple) * multiple if trainer.ub_tp_comm_overlap else None


def _data_section(section: str, optim: OptimConfig, trainer: NemoAlignerSettings) -> dict[str, Any]:
    batch = {"global_batch_size": optim.global_batch_size, "micro_batch_size": trainer.rows_at_a_time(optim)}
    return {
        "seq_length": optim.max_seq_length,
        "num_workers": 0,
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
        "validation_drop_last": True,
        "pad_length_to_multiple_of": fixed_length(optim, trainer) or _length_multiple(trainer),
        **({"rows_together": optim.rows_together} if optim.rows_together > 1 else {}),
        # GPTSFTModel's batch sizes, which it sets around a validation.
        **({"train_ds": dict(batch), "validation_ds": dict(batch)} if section == "sft" else {}),
    }
