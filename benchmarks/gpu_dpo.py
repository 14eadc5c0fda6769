"""Parts `dpo-1b` and `dpo-3b` of gpu.py: DPO of a Llama with random weights, against TRL and against the plan."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpu_device import training_flops
from gpu_session import Session

from nemo_srl import estimates
from nemo_srl.config import DPOConfig
from nemo_srl.models.hf import read_spec
from nemo_srl.models.spec import ModelSpec
from nemo_srl.trainers import trainer_backend
from nemo_srl.trainers.nemo_aligner.settings import NemoAlignerSettings
from nemo_srl.workload import Assumptions

LEARNING_RATE = 1e-6
MIN_SPEEDUP = {"TRL": 2.0, "TRL, precomputed reference": 1.5}
PLAN_TOLERANCE = 0.05


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is trained. `num_pairs` are one step."""

    shape: str
    num_pairs: int
    micro_batch_size: int
    max_length: int = 1024
    num_warmup_steps: int = 3
    num_steps: int = 10
    """Timed steps, after those that warm up."""


SIZES = {
    "dpo-1b": Size(shape="Llama-3.2-1B-Instruct", num_pairs=32, micro_batch_size=4),
    "dpo-3b": Size(shape="Llama-3.2-3B-Instruct", num_pairs=16, micro_batch_size=1),
}
SMALL = Size(shape="tiny", num_pairs=4, micro_batch_size=2, max_length=128, num_warmup_steps=1, num_steps=2)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a training reached."""

    step_seconds: float
    tokens_per_second: float
    """Tokens of the sequences, without padding."""
    mfu: float
    """Model FLOPs per second, as a share of the device's peak."""
    allocated: int | None
    reserved: int | None
    """Peaks in bytes. None on a CPU."""

    def __str__(self) -> str:
        text = f"{self.step_seconds:.2f} s a step, {self.tokens_per_second:,.0f} tokens/s, MFU {self.mfu:.2f}"
        if self.allocated is None or self.reserved is None:
            return f"{text}; a CPU's memory is not measured"
        return f"{text}; {self.allocated / 1e9:.1f} GB allocated, {self.reserved / 1e9:.1f} GB reserved"


def speed(
    found: Mapping[str, Any], spec: ModelSpec, lengths: Sequence[int], *, num_warmup_steps: int, forward_passes: int,
    peak_tflops: float,
) -> Speed:  # fmt: skip
    """From a measured training. Its `step_seconds` begin with the second step."""
    seconds = statistics.median(found["step_seconds"][num_warmup_steps - 1 :])
    flops = training_flops(spec, lengths, forward_passes=forward_passes)
    memory = found["memory"] or {}
    return Speed(
        step_seconds=seconds, tokens_per_second=sum(lengths) / seconds, mfu=flops / seconds / (peak_tflops * 1e12),
        allocated=memory.get("allocated"), reserved=memory.get("reserved"),
    )  # fmt: skip


def run(session: Session, part: str) -> None:
    size = SMALL if session.small else SIZES[part]
    if (directory := session.model(size.shape)) is None:
        return
    spec, pairs = read_spec(directory / "model"), json.loads((directory / "pairs.json").read_text())
    lengths = pairs["lengths"][: 2 * size.num_pairs]
    common = {
        "model": directory / "model", "pairs": directory / "pairs.json", "num_pairs": size.num_pairs,
        "max_length": size.max_length, "num_steps": size.num_warmup_steps + size.num_steps,
        "learning_rate": LEARNING_RATE,
    }  # fmt: skip
    settings = {"precision": "bf16-O2", "platform": session.device, "micro_batch_size": size.micro_batch_size}
    case = {**common, "algorithm": "dpo", "work_dir": session.directory / f"{part}-nemo", "trainer": settings}
    about = {"num_warmup_steps": size.num_warmup_steps, "peak_tflops": session.about["machine"]["peak_tflops"]}
    if (found := session.measure("nemo_srl", "gpu_training.py", case)) is None:
        return
    # The reference is computed once, before the first step, so a step has none.
    ours = speed(found, spec, lengths, forward_passes=3, **about)
    session.add(f"{size.shape}, nemo_srl", str(ours), values={**found, **vars(ours), "tokens_per_step": sum(lengths)})
    compare_with_plan(session, size, spec, lengths, found, ours)
    for name, goal in MIN_SPEEDUP.items():
        peer = {
            **common, "kind": "dpo", "precompute": "precomputed" in name, "micro_batch_size": size.micro_batch_size,
            "work_dir": session.directory / f"{part}-trl",
        }  # fmt: skip
        if (found := session.measure(name, "gpu_peers.py", peer, peers=True)) is not None:
            passes = 3 if peer["precompute"] else 4
            theirs = speed(found, spec, lengths, forward_passes=passes, **about)
            compare_with_trl(session, f"{size.shape}, {name}", ours, theirs, goal, {**found, **vars(theirs)})


def compare_with_trl(
    session: Session, name: str, ours: Speed, theirs: Speed, goal: float, values: Mapping[str, Any]
) -> None:
    ratio, result = theirs.step_seconds / ours.step_seconds, str(theirs)
    result += f". nemo_srl: {ratio:.2f} x as fast"
    reached, memory = ratio >= goal, None
    if ours.allocated is not None and theirs.allocated is not None:
        memory = ours.allocated / theirs.allocated
        result += f" with {memory:.2f} of the memory allocated"
        reached &= memory <= 1
    session.add(
        name, result, goal=f"{goal:g} x as fast, no more memory", reached=None if session.small else reached,
        values={**values, "speedup": ratio, "memory_ratio": memory},
    )  # fmt: skip


def compare_with_plan(
    session: Session, size: Size, spec: ModelSpec, lengths: Sequence[int], found: Mapping[str, Any], ours: Speed
) -> None:
    """What `recipes/plan.py` would have said of this training."""
    trainer = NemoAlignerSettings(precision="bf16-O2", micro_batch_size=size.micro_batch_size)
    optim = DPOConfig(global_batch_size=size.num_pairs, max_seq_length=size.max_length)
    planned = trainer_backend(trainer).memory(optim, trainer, spec)
    text = f"{planned.total / 1e9:.1f} GB planned, of which {planned.overhead / 1e9:.1f} GB are overhead"
    if found["memory"] is None:
        session.add(f"{size.shape}, memory by the plan", f"{text}; a CPU's memory is not measured")
    else:
        memory = found["memory"]
        used = memory["reserved"] + memory["beside"]
        ratio = planned.total / used
        allocated = (planned.total - planned.overhead) / memory["allocated"]
        session.add(
            f"{size.shape}, memory by the plan",
            f"{text}; {used / 1e9:.1f} GB used: {ratio:.3f} of it planned. Without the overhead, {allocated:.3f} of "
            "what was allocated",
            goal=f"within {PLAN_TOLERANCE:.0%}", reached=abs(ratio - 1) <= PLAN_TOLERANCE,
            values={"planned": vars(planned), "used": used, **memory},
        )  # fmt: skip
    a = Assumptions(peak_tflops=session.about["machine"]["peak_tflops"])
    flops = training_flops(spec, lengths, forward_passes=3)
    rate = a.peak_tflops * a.training_mfu * trainer.pipeline_efficiency(optim)
    computing = 3600 * estimates.training_hours(flops, num_gpus=1, tflops_per_gpu=rate)
    planned_seconds = computing + a.step_overhead_seconds
    session.add(
        f"{size.shape}, step time by the plan",
        f"{planned_seconds:.2f} s planned ({computing:.2f} s at MFU {a.training_mfu:g} + {a.step_overhead_seconds:g} "
        f"s); {ours.step_seconds:.2f} s measured",
        values={"computing_seconds": computing, "planned_seconds": planned_seconds},
    )
