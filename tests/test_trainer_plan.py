"""The plan equals its golden files, its schedule counts real steps, and every trap of NeMo-Aligner is refused."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_srl.config import DPOConfig, RefreshConfig, SFTConfig
from nemo_srl.errors import ConfigError
from nemo_srl.models.spec import ModelSpec
from nemo_srl.trainers import open_trainer, trainer_backend
from nemo_srl.trainers.nemo_aligner import overlap
from nemo_srl.trainers.nemo_aligner.data import DataStatistics
from nemo_srl.trainers.nemo_aligner.settings import NemoAlignerSettings
from nemo_srl.trainers.nemo_aligner.training_plan import make_plan

GOLDEN = Path(__file__).parent / "data"
SPEC = ModelSpec(
    model_type="llama",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=128,
    vocab_size=128256,
    max_position_embeddings=131072,
    rope_theta=500000.0,
    rope_scaling={
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    eos_token_ids=(128001, 128008, 128009),
)


def rows(number: int, *, too_long: int = 0) -> DataStatistics:
    return DataStatistics(num_rows=number, num_rows_too_long=too_long)


def plan(
    optim: SFTConfig | DPOConfig | None = None,
    *,
    spec: ModelSpec = SPEC,
    train: DataStatistics | None = None,
    **trainer: Any,
) -> dict[str, Any]:
    return make_plan(
        optim or DPOConfig(), NemoAlignerSettings(**trainer), seed=1234, spec=spec, train=train or rows(1000)
    )


@pytest.mark.parametrize("optim", [SFTConfig(warmup_fraction=0.1), DPOConfig(max_epochs=2)], ids=["sft", "dpo"])
def test_plan_equals_golden_file(optim: SFTConfig | DPOConfig) -> None:
    """To accept a change: write `actual` to the file, and read the difference before committing it."""
    actual = OmegaConf.to_yaml(
        OmegaConf.create(
            plan(
                optim,
                precision="bf16-O2",
                tensor_model_parallel_size=4,
                pipeline_model_parallel_size=2,
                sequence_parallel=True,
                num_nodes=2,
                devices=8,
                micro_batch_size=2,
            )
        )
    )
    name = "trainer_plan_dpo.yaml" if isinstance(optim, DPOConfig) else "trainer_plan_sft.yaml"
    assert actual == (GOLDEN / name).read_text()


def test_planning_needs_neither_torch_nor_nemo() -> None:
    program = (
        "import sys, nemo_srl.trainers, nemo_srl.trainers.nemo_aligner.training_plan, nemo_srl.trainers.nemo_aligner\n"
        "nemo_srl.trainers.open_trainer(nemo_srl.trainers.nemo_aligner.BACKEND.settings())\n"
        "assert not {'torch', 'nemo', 'megatron', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize("num_rows", [16, 33, 1000])
@pytest.mark.parametrize("warmup_fraction", [0.0, 0.1, 0.5])
def test_schedule_spans_exactly_the_steps_there_are(num_rows: int, warmup_fraction: float) -> None:
    """NeMo's CosineAnnealing, as nemo/core/optim/lr_scheduler.py computes it, at every step of the run."""
    optim = DPOConfig(max_epochs=2, warmup_fraction=warmup_fraction)
    result = plan(optim, train=rows(num_rows))
    num_steps, sched = result["num_steps"], result["model"]["optim"]["sched"]
    assert num_steps == 2 * (num_rows // 16)
    assert sched["constant_steps"] == 0

    def lr(step: int) -> float:
        if 0 < sched["warmup_steps"] >= step:
            return optim.learning_rate * (step + 1) / (sched["warmup_steps"] + 1)
        if step > sched["max_steps"]:
            return optim.min_learning_rate
        share = (step - sched["warmup_steps"]) / (sched["max_steps"] - sched["warmup_steps"])
        span = optim.learning_rate - optim.min_learning_rate
        return optim.min_learning_rate + span * (1 + math.cos(math.pi * share)) / 2

    lrs = [lr(step) for step in range(num_steps)]
    assert all(optim.learning_rate / num_steps <= x <= optim.learning_rate for x in lrs[: sched["warmup_steps"]])
    assert min(lrs) > 0
    assert max(lrs) == pytest.approx(optim.learning_rate)
    assert lrs[-1] == pytest.approx(optim.min_learning_rate) or num_steps == sched["warmup_steps"] + 1


@pytest.mark.parametrize("save_interval", [1, 7, 10_000])
def test_saving_always_falls_on_a_validation(save_interval: int) -> None:
    section = plan(DPOConfig(save_interval=save_interval))["trainer"]["dpo"]
    assert section["save_interval"] % section["val_check_interval"] == 0
    assert 1 <= section["val_check_interval"] <= section["max_steps"]


def test_there_is_no_validation() -> None:
    assert plan()["trainer"]["dpo"]["limit_val_batches"] == 0


def test_clipping_is_set_where_the_distributed_optimizer_reads_it() -> None:
    assert plan(DPOConfig(gradient_clip_val=0.5))["trainer"]["gradient_clip_val"] == 0.5
    # No clipping, but the norm is still computed.
    assert plan(DPOConfig(gradient_clip_val=0.0))["trainer"]["gradient_clip_val"] == math.inf


@pytest.mark.parametrize(
    ("vocab_size", "tensor_model_parallel_size", "divisor", "padded"),
    [
        (49152, 1, 128, 49152),
        (49152, 3, 128, 49152),
        (128256, 8, 32, 128256),
        (32001, 1, 1, 32001),
        (32001, 2, 1, 32002),
    ],
)
def test_vocabulary_is_padded_only_where_ranks_need_it(
    vocab_size: int, tensor_model_parallel_size: int, divisor: int, padded: int
) -> None:
    """Padded rows take part in NeMo's softmax."""
    spec = dataclasses.replace(
        SPEC, vocab_size=vocab_size, num_attention_heads=24, num_query_groups=24, ffn_hidden_size=24 * 100
    )
    model = plan(spec=spec, tensor_model_parallel_size=tensor_model_parallel_size)["model"]
    assert model["make_vocab_size_divisible_by"] == divisor
    assert model["override_vocab_size"] == padded


def test_precisions() -> None:
    models = {p: plan(precision=p)["model"] for p in ("bf16", "bf16-O2", "32")}
    assert {p: m["megatron_amp_O2"] for p, m in models.items()} == {"bf16": False, "bf16-O2": True, "32": False}
    assert {p: m["precision"] for p, m in models.items()} == {"bf16": "bf16", "bf16-O2": "bf16", "32": "32"}


def test_where_adams_moments_stay_is_in_the_plan_only_if_it_is_not_usual() -> None:
    usual, offloaded = plan()["model"]["optim"], plan(optimizer_cpu_offload=True)["model"]["optim"]
    assert offloaded == {**usual, "optimizer_cpu_offload": True}


def test_overlaps_are_planned_by_nemos_names() -> None:
    optim = plan(overlap_grad_reduce=True, overlap_param_gather=True)["model"]["optim"]
    assert (optim["overlap_grad_sync"], optim["overlap_param_sync"]) == (True, True)


USER_BUFFERS = {"ub_tp_comm_overlap": True, "sequence_parallel": True, "tensor_model_parallel_size": 2}


@pytest.mark.parametrize(("longest", "padded"), [(2048, 2048), (2050, 2064)])
def test_user_buffers_are_planned_by_nemos_name_with_one_length_for_all(longest: int, padded: int) -> None:
    """A multiple of 8 for each tensor-parallel rank. No row is longer than this length."""
    optim = DPOConfig(max_seq_length=longest)
    usual = plan(optim, **{**USER_BUFFERS, "ub_tp_comm_overlap": False})["model"]
    model = plan(optim, **USER_BUFFERS)["model"]
    assert model.pop("ub_tp_comm_overlap") is True
    assert (usual["data"].pop("pad_length_to_multiple_of"), model["data"].pop("pad_length_to_multiple_of")) == (
        16, padded
    )  # fmt: skip
    assert model == usual


class Buffered:
    """What `allocate_buffers` needs of NeMo's model, whose `initialize_ub_func` takes this shape."""

    def __init__(self, **cfg: Any) -> None:
        self.cfg = OmegaConf.create(cfg)
        self.initialize_ub, self.num_tokens = True, 0

    def initialize_ub_func(self) -> None:
        assert self.num_tokens == 0, "Transformer Engine allocates once"
        cfg = self.cfg
        self.num_tokens = cfg.encoder_seq_length * cfg.micro_batch_size // cfg.context_parallel_size
        self.initialize_ub = False


@pytest.mark.parametrize(("num_sequences", "num_tokens"), [(2, 2 * 2064), (4, 4 * 2064)], ids=["sft", "dpo"])
def test_user_buffers_have_room_for_a_micro_batch_and_no_more(num_sequences: int, num_tokens: int) -> None:
    model = Buffered(encoder_seq_length=2050, micro_batch_size=2, context_parallel_size=1)
    for _ in range(2):
        overlap.allocate_buffers(model, num_sequences=num_sequences, length=2064)
    assert (model.num_tokens, model.cfg.encoder_seq_length) == (num_tokens, 2050)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overlap_param_gather": True}, r"trainer.overlap_param_gather=True: needs trainer.overlap_grad_reduce=true"),
        ({"ub_tp_comm_overlap": True}, r"trainer.ub_tp_comm_overlap=True: .*sequence_parallel=true.*false"),
        (
            {"ub_tp_comm_overlap": True, "sequence_parallel": True},
            r"trainer.ub_tp_comm_overlap=True: .*tensor_model_parallel_size above 1",
        ),
        ({**USER_BUFFERS, "precision": "32"}, r"trainer.ub_tp_comm_overlap=True: .*bf16-O2"),
        (
            {**USER_BUFFERS, "num_nodes": 2, "devices": 1},
            r"trainer.ub_tp_comm_overlap=True: .*tensor_model_parallel_size=2 .* the 1 ranks of a node",
        ),
        ({**USER_BUFFERS, "platform": "cuda"}, r"trainer.ub_tp_comm_overlap=True: the platform cuda .*platform=ngc"),
        (
            {"virtual_pipeline_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
            r"trainer.virtual_pipeline_model_parallel_size=2: NeMo-Aligner .*Set it to 1",
        ),
    ],
)
def test_overlaps_that_cannot_be_right_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NemoAlignerSettings(**settings)


def test_recomputation_is_planned_layer_by_layer() -> None:
    def planned(granularity: str) -> list[Any]:
        model = plan(recompute_granularity=granularity)["model"]
        return [model[f"activations_checkpoint_{key}"] for key in ("granularity", "method", "num_layers")]

    assert planned("none") == [None, None, None]
    assert planned("selective") == ["selective", None, None]
    assert planned("full") == ["full", "uniform", 1]
    with pytest.raises(ConfigError, match=r"trainer.recompute_granularity='all'.*selective"):
        plan(recompute_granularity="all")


def test_adapters_are_planned_for_every_linear_layer() -> None:
    peft = plan(lora_rank=8, lora_alpha=16.0)["model"]["peft"]
    assert (peft["peft_scheme"], peft["lora_tuning"]["target_modules"]) == ("lora", ["all"])
    assert (peft["lora_tuning"]["adapter_dim"], peft["lora_tuning"]["alpha"]) == (8, 16.0)


def test_linear_and_no_rope_scaling() -> None:
    linear = dataclasses.replace(SPEC, rope_scaling={"type": "linear", "factor": 2.0})
    assert plan(spec=linear)["model"]["seq_len_interpolation_factor"] == 2.0
    none = plan(spec=dataclasses.replace(SPEC, rope_scaling=None))["model"]
    assert none["seq_len_interpolation_factor"] is None
    assert none["scale_positional_embedding"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tensor_model_parallel_size": 3}, r"trainer.tensor_model_parallel_size=3: .*32 attention heads.*1, 2, 4, 8"),
        ({"tensor_model_parallel_size": 16}, r"tensor_model_parallel_size=16: .*8 query groups.*Usable.*1, 2, 4, 8"),
        ({"pipeline_model_parallel_size": 3}, r"pipeline_model_parallel_size=3: .*32 layers.*1, 2, 4, 8, 16, 32"),
        ({"sequence_parallel": True}, r"trainer.sequence_parallel=True: .*only one.*false"),
        ({"lora_rank": 6, "tensor_model_parallel_size": 4}, r"trainer.lora_rank=6: .*multiple of .*size=4"),
        (
            {"lora_rank": 8, "tensor_model_parallel_size": 2, "sequence_parallel": True},
            r"trainer.sequence_parallel=True: does not work with trainer.lora_rank=8: .*false",
        ),
        ({"frozen_share": 1.0}, r"trainer.frozen_share=1.0: must be .* below 1, so that there is something to train"),
        (
            {"frozen_share": 0.125, "pipeline_model_parallel_size": 2},
            r"trainer.frozen_share=0.125: does not work with trainer.pipeline_model_parallel_size=2.*size=1",
        ),
        (
            {"frozen_share": 0.125, "lora_rank": 8},
            r"frozen_share=0.125: does not work with trainer.lora_rank=8.*rank=0",
        ),
        (
            {"frozen_share": 0.125, "recompute_granularity": "full"},
            r"frozen_share=0.125: does not work with trainer.recompute_granularity=full.*granularity=none",
        ),
        ({"frozen_share": 0.03}, r"frozen_share=0.03: is less than one of .* 32 layers.*share=0,.*least 0.032"),
        ({"frozen_share": -1.0}, r"trainer.frozen_share=-1.0: must be at least 0"),
        ({"micro_batch_size": 3}, r"dpo.global_batch_size=16: .*3 x 1.*multiple of 3"),
        ({"devices": 3}, r"dpo.global_batch_size=16: .*1 x 3.*multiple of 3"),
        ({"train": rows(7)}, r"dpo.global_batch_size=16: .*only 7 training rows.*at most 7"),
        ({"train": rows(7, too_long=20)}, r"only 7 training rows \(20 more were longer than dpo.max_seq_length\)"),
        ({"optim": SFTConfig(max_seq_length=200_000)}, r"sft.max_seq_length=200000: .*131072"),
        ({"optim": RefreshConfig(max_seq_length=200_000)}, r"^refresh.max_seq_length=200000: .*131072"),
        ({"optim": DPOConfig(preference_loss="orpo")}, r"dpo.preference_loss='orpo': .*rpo_sq.*dotted path"),
        ({"optim": DPOConfig(label_smoothing=0.1)}, r"dpo.label_smoothing=0.1: .*does not use it"),
        ({"optim": DPOConfig(preference_loss="tests.user_losses:absent")}, r"preference_loss='tests.*absent"),
        ({"optim": DPOConfig(preference_loss="tests.user_losses:NUMBER")}, r"preference_loss=.*NUMBER.*not a callable"),
        ({"optim": DPOConfig(preference_loss="tests.user_losses:temperature")}, r"as a loss: .*'temperature'.*beta"),
        (
            {"spec": dataclasses.replace(SPEC, rope_scaling={"rope_type": "yarn", "factor": 4.0})},
            r"rope_scaling.rope_type='yarn'.*linear and llama3",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_key_value_reason_and_remedy(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(**arguments)


def test_unknown_trainer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"trainer.name='trl'.*nemo_aligner"):
        open_trainer(NemoAlignerSettings(name="trl"))


def test_a_refresh_is_planned_as_sft() -> None:
    assert plan(RefreshConfig()) == plan(SFTConfig())


def test_a_users_loss_is_kept_in_the_plan() -> None:
    assert plan(DPOConfig(preference_loss="tests.user_losses:dpo"))["model"]["dpo"]["preference_loss"] == (
        "tests.user_losses:dpo"
    )


def test_the_backend_checks_every_training_of_a_run() -> None:
    settings = NemoAlignerSettings()
    backend = trainer_backend(settings)
    backend.check(settings, [SFTConfig(), DPOConfig(), RefreshConfig()], SPEC)
    with pytest.raises(ConfigError, match=r"refresh\.max_seq_length=200000"):
        backend.check(settings, [SFTConfig(), DPOConfig(), RefreshConfig(max_seq_length=200_000)], SPEC)
