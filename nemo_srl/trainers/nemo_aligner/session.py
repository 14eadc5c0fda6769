"""Builds NeMo-Aligner's objects and runs them; see `run.py`. It imports NeMo, so others import it late.

Covers SFT and DPO, of all weights, of the upper layers, or with LoRA. An error that `feasibility.py` did not foresee
appears here, as NeMo's own.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from megatron.core import parallel_state
from megatron.core.models.gpt import gpt_layer_specs
from nemo.collections.nlp.models.language_modeling import megatron_gpt_model as gpt_model
from nemo.utils import logging as nemo_logging
from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint
from nemo.utils.exp_manager import exp_manager
from nemo_aligner.algorithms import dpo as dpo_algorithm
from nemo_aligner.algorithms import supervised as supervised_algorithm
from nemo_aligner.algorithms.dpo import DPOTrainer
from nemo_aligner.algorithms.supervised import SupervisedTrainer
from nemo_aligner.data.nlp import builders
from nemo_aligner.models.nlp.gpt import gpt_sft_model as sft_model
from nemo_aligner.models.nlp.gpt import megatron_gpt_dpo_model as dpo_model
from nemo_aligner.models.nlp.gpt.gpt_sft_model import GPTSFTModel
from nemo_aligner.models.nlp.gpt.megatron_gpt_dpo_model import MegatronGPTDPOModel
from nemo_aligner.utils.train_script_utils import (
    CustomLoggerWrapper,
    add_custom_checkpoint_callback,
    extract_optimizer_scheduler_from_ptl_model,
    init_distributed,
    init_peft,
    init_using_ptl,
    resolve_and_create_trainer,
    retrieve_custom_trainer_state_dict,
)
from nemo_aligner.utils.utils import load_from_nemo
from omegaconf import DictConfig, OmegaConf

from nemo_srl.errors import ConfigError, StoppedError
from nemo_srl.trainers.nemo_aligner import (
    checkpoints,
    context_parallel,
    divergence,
    frozen,
    lora,
    losses,
    objectives,
    overlap,
    reference,
    shared_beginnings,
    targets,
)
from nemo_srl.trainers.nemo_aligner.batches import batch_dpo, collate_dpo, collate_sft
from nemo_srl.trainers.nemo_aligner.data import TRAIN_FILE, read_rows
from nemo_srl.trainers.nemo_aligner.metrics import METRICS_FILE, MetricsFile
from nemo_srl.trainers.nemo_aligner.micro_batches import MicroBatches, Targets
from nemo_srl.trainers.nemo_aligner.progress import StepBar
from nemo_srl.trainers.nemo_aligner.sampling import AlikeTogetherSampler
from nemo_srl.trainers.nemo_aligner.stopping import StopRequest
from nemo_srl.trainers.nemo_aligner.training_plan import NEMO_DIR, PLAN_FILE, START_DIR, TOKENIZER_DIR


def run_session(work_dir: Path, *, adapt_plan: Callable[[DictConfig], None]) -> None:
    """Build everything from the plan in `work_dir` and train to its end."""
    cfg = _load_plan(work_dir)
    adapt_plan(cfg)
    # NeMo warns of every key that a configuration could have, and Lightning lists the accelerators it does not use.
    nemo_logging.setLevel(nemo_logging.ERROR)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # As upstream's scripts do: a forked child cannot use CUDA.
    torch.multiprocessing.set_start_method("spawn", force=True)
    algorithm = "dpo" if "dpo" in cfg.trainer else "sft"
    dpo_algorithm.tqdm = supervised_algorithm.tqdm = StepBar
    keep_in = work_dir if cfg.get("keep_checkpoints") else None
    NeMoModelCheckpoint.remove_checkpoint_unfinished_marker = staticmethod(partial(finish_checkpoint, keep_in=keep_in))
    trainer = resolve_and_create_trainer(cfg, algorithm)
    exp_manager(trainer, cfg.exp_manager)
    model = _load_model(cfg, trainer, algorithm, work_dir / START_DIR)
    progress = retrieve_custom_trainer_state_dict(trainer) or {}  # empty at the first start
    init_distributed(trainer, model, cfg.model.transformer_engine)
    rows = list(read_rows(work_dir / TRAIN_FILE))
    loader = _build_loader(cfg, algorithm, rows, model.tokenizer.eos_id, progress.get("consumed_samples", 0))
    init_using_ptl(trainer, model, loader, rows)
    micro_batches = _compute_what_is_needed(model, cfg.model)
    rows_at_a_time = cfg.model.micro_batch_size * (2 if algorithm == "dpo" else 1)
    overlap.allocate_buffers(model, num_sequences=rows_at_a_time, length=micro_batches.multiple)
    metrics = _open_metrics(cfg, work_dir, progress) if trainer.is_global_zero else None
    loop = _build_loop(cfg, trainer, model, loader, micro_batches, metrics)
    divergence.watch(loop, _record_step(loop.optimizer, metrics, micro_batches), work_dir)
    if progress:
        loop.load_state_dict(progress)
    loss = losses.find(cfg.model.dpo.preference_loss) if algorithm == "dpo" else None
    if algorithm == "dpo" and (loss is None or loss.needs_reference):
        reference.attach(model, rows, work_dir, micro_batches, step=loop.step)
        micro_batches.take_padding()  # that of the training begins here
    loop.fit()
    if loop.step < cfg.num_steps:
        torch.distributed.barrier()  # a launcher may end all ranks as soon as the first one ends
        raise StoppedError(f"training was asked to stop and saved step {loop.step} of {cfg.num_steps}")


def finish_checkpoint(checkpoint_path: Any, barrier_before: bool = False, *, keep_in: Path | None = None) -> None:
    """Remove the marker of an unfinished checkpoint, when all ranks have done their part. Keep it in a work directory.

    Takes the place of NeMo's function. That one hides that the barrier failed, goes on, and marks the previous
    checkpoint, which it wants to remove. So if a node died at the end of a save, no checkpoint would be left.
    """
    if barrier_before and torch.distributed.is_initialized():
        torch.distributed.barrier()
    if os.environ["RANK"] == "0":
        NeMoModelCheckpoint.format_checkpoint_unfinished_marker_path(checkpoint_path).unlink(missing_ok=True)
        directory = Path(str(checkpoint_path).removesuffix(".ckpt"))  # NeMo names a file and writes a directory
        if keep_in is not None and directory.is_dir():  # this is also called after NeMo has removed one
            checkpoints.keep(directory, keep_in)


def _load_plan(work_dir: Path) -> DictConfig:
    cfg = OmegaConf.load(work_dir / PLAN_FILE)
    assert isinstance(cfg, DictConfig)
    planned, started = cfg.trainer.num_nodes * cfg.trainer.devices, int(os.environ["WORLD_SIZE"])
    if started != planned:
        # Otherwise the ranks would wait for the missing ones until a timeout.
        raise ConfigError(
            f"trainer.devices={cfg.trainer.devices}: num_nodes x devices = {planned} ranks were planned, and "
            f"{started} were started. Start one process per rank."
        )
    cfg.exp_manager.explicit_log_dir = str(work_dir / NEMO_DIR)
    cfg.model.tokenizer.type = str(work_dir / TOKENIZER_DIR)
    return cfg


def _load_model(cfg: DictConfig, trainer: Any, algorithm: str, start_dir: Path) -> Any:
    cls = MegatronGPTDPOModel if algorithm == "dpo" else GPTSFTModel
    if cfg.model.get("qk_layernorm", False):
        _build_layers_with_qk_norms()
    model = load_from_nemo(cls, cfg.model, trainer, strict=True, restore_path=str(start_dir))
    init_peft(model, cfg.model)
    if cfg.model.peft.peft_scheme == "lora":
        lora.install(model, seed=cfg.model.seed)
    if number := cfg.get("num_frozen_layers"):
        frozen.freeze(model, number)
        frozen.save_moments_of_trained_layers(trainer.strategy, number)
    if cfg.model.context_parallel_size > 1:
        context_parallel.cut_batches(model)
    if algorithm == "sft":
        objectives.average_over_tokens(model)
        return model
    loss = losses.find(cfg.model.dpo.preference_loss)
    objectives.use_losses_of_pairs(model, loss, over_ranks=context_parallel.total)
    model.get_ref_policy_logprobs = reference.of_batch
    return model


def _build_layers_with_qk_norms() -> None:
    """Let NeMo ask megatron-core for them. NeMo 2.2's `get_specs` never does, whatever the configuration says."""
    gpt_model.get_gpt_layer_with_transformer_engine_spec = partial(
        gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec, qk_layernorm=True
    )


def _compute_what_is_needed(model: Any, cfg: DictConfig) -> MicroBatches:
    """Little padding, logits only where there is a target, and common beginnings once if the platform can."""
    where = Targets()
    targets.install(model, where)
    # Layers read the layout of the micro-batch that was handed out last. In a pipeline, that is another one when they
    # are computed again.
    recomputed = cfg.activations_checkpoint_granularity and cfg.pipeline_model_parallel_size > 1
    # megatron-core's attention with dropout sees whole sequences.
    share = cfg.data.get("share_beginnings", False) and not recomputed and not cfg.attention_dropout
    micro_batches = MicroBatches(
        where, multiple=cfg.data.pad_length_to_multiple_of, share_beginnings=share,
        part_of_rank=context_parallel.mine,
    )  # fmt: skip
    sft_model.get_iterator_k_split = dpo_model.get_iterator_k_split = micro_batches
    # Micro-batches have lengths of their own. So a pipeline stage sends the shape before the hidden states.
    for module in model.get_model_module_list():
        module.config.variable_seq_lengths = parallel_state.get_pipeline_model_parallel_world_size() > 1
        if share:
            shared_beginnings.use_positions(module.rotary_pos_emb)
    return micro_batches


def _build_loader(cfg: DictConfig, algorithm: str, rows: list[dict[str, Any]], pad_id: int, consumed: int) -> Any:
    multiple = cfg.model.data.pad_length_to_multiple_of
    sft = partial(collate_sft, pad_id=pad_id, multiple=multiple)
    if (largest_group := cfg.model.data.get("rows_together", 1)) > 1:
        builders.MegatronPretrainingRandomBatchSampler = partial(
            AlikeTogetherSampler, rows, largest_group=largest_group
        )
    return builders.build_dataloader(
        cfg=cfg,
        dataset=rows,
        consumed_samples=consumed,
        mbs=cfg.model.micro_batch_size,
        gbs=cfg.model.global_batch_size,
        collate_fn=partial(collate_dpo, pad_id=pad_id) if algorithm == "dpo" else sft,
    )


def _build_loop(
    cfg: DictConfig, trainer: Any, model: Any, loader: Any, micro_batches: MicroBatches, metrics: MetricsFile | None
) -> Any:
    optimizer, scheduler = extract_optimizer_scheduler_from_ptl_model(model)
    arguments = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "train_dataloader": loader,
        "val_dataloader": loader,  # there is no validation, but the loop asks for the length of a loader
        "test_dataloader": None,
        "logger": CustomLoggerWrapper([] if metrics is None else [metrics]),
        "ckpt_callback": overlap.fetch_before_saving(add_custom_checkpoint_callback(trainer, model), model),
        "run_timer": StopRequest(),
    }
    if "dpo" in cfg.trainer:
        collate = partial(batch_dpo, pad_id=model.tokenizer.eos_id, multiple=micro_batches.multiple)
        return DPOTrainer(cfg=cfg.trainer.dpo, collate_fn=collate, **arguments)
    return SupervisedTrainer(cfg=cfg.trainer.sft, **arguments)


def _open_metrics(cfg: DictConfig, work_dir: Path, progress: dict[str, int]) -> MetricsFile:
    beta = cfg.model.dpo.ref_policy_kl_penalty if "dpo" in cfg.model else None
    return MetricsFile(work_dir / METRICS_FILE, beta=beta, first_step=progress.get("step", 0))


def _record_step(optimizer: Any, metrics: MetricsFile | None, micro_batches: MicroBatches) -> Callable[[], float]:
    """Give `metrics` what only this moment knows: the norm before clipping, which the distributed optimizer's `step`
    returns, and the share of padding. Returns what gives the last norm, on every rank.
    """
    inner_step, norm = optimizer.step, 0.0

    def step(closure: Any = None) -> Any:
        nonlocal norm
        result = inner_step(closure)
        norm = float(result[1])
        if metrics is not None:
            metrics.grad_norm, metrics.padding = norm, micro_batches.take_padding()
        return result

    optimizer.step = step
    return lambda: norm
