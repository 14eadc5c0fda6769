"""Estimates what a recipe needs, before it uses any GPU: memory, time and disk.

    python recipes/plan.py recipe=srl-llama2-70b-8n8g-tp8pp4
    python recipes/plan.py recipe=srl-llama3.1-8b-1n8g-tp8 prompts.num_prompts=20000 ++assume.training_mfu=0.3

Every setting in conf/ can be given, and with `++assume.` every assumption that it prints. The model's weights are not
needed: recipes/shapes/ has the config.json of some models. Exit status 2 means that a setting cannot work or that the
memory is too small. docs/plan.md has the formulas and their sources.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, fields
from pathlib import Path

from hydra import compose, initialize_config_dir

from nemo_srl import cli, estimates, models, worker
from nemo_srl.config import Config, OptimConfig, load
from nemo_srl.errors import ModelError
from nemo_srl.models.arithmetic import num_parameters
from nemo_srl.models.hf import read_shape
from nemo_srl.models.spec import ModelSpec
from nemo_srl.preflight import check_shape
from nemo_srl.trainers import trainer_backend
from nemo_srl.workload import Assumptions, assumptions

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ROOT / "recipes" / "shapes"


def compose_config(overrides: list[str]) -> tuple[Config, Assumptions]:
    """Raises `ConfigError` and Hydra's errors."""
    cli.register_schemas(overrides, schema=Config)
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        composed = compose("iterate", ["run_dir=runs/plan", *overrides])
    cfg = load(composed, Config)
    return cfg, assumptions(cfg.assume)


def shape_of(model_path: str, cache_dir: str) -> ModelSpec:
    """The shape of the model, from its directory if it exists, else from recipes/shapes/."""
    shapes = {p.name.lower(): p for p in SHAPES.iterdir()}
    if (known := shapes.get(Path(model_path).name.lower())) and not Path(model_path).is_dir():
        return read_shape(known)
    try:
        return read_shape(models.resolve(model_path, Path(cache_dir).expanduser()))
    except ModelError as e:
        names = ", ".join(sorted(p.name for p in shapes.values()))
        raise ModelError(
            f"{e}\nTo plan without the model, put its config.json into {SHAPES}/<name>/. It has {names}."
        ) from None


def memory_table(cfg: Config, spec: ModelSpec, a: Assumptions) -> tuple[list[str], bool]:
    """The lines of the table, and whether everything fits."""
    lines = [
        f"{'GB per GPU':14} {'weights+grads':>13} {'optimizer':>10} {'activations':>12} {'logits':>7} {'total':>7}"
    ]
    fits = True
    sections: tuple[tuple[str, OptimConfig], ...] = (("sft", cfg.sft), ("policy (DPO)", cfg.dpo))
    for name, optim in sections:
        m = trainer_backend(cfg.trainer).memory(optim, cfg.trainer, spec)
        fits &= m.total <= a.gpu_memory_gb * 1e9
        lines.append(
            f"{name:14} {m.weights_and_gradients / 1e9:13.1f} {m.optimizer / 1e9:10.1f} {m.activations / 1e9:12.1f} "
            f"{m.logits / 1e9:7.1f} {m.total / 1e9:7.1f}  of {a.gpu_memory_gb:g}"
            + ("" if m.total <= a.gpu_memory_gb * 1e9 else "  DOES NOT FIT")
        )
    host = estimates.host_bytes(cfg, spec) / 1e9
    lines.append(f"{'on each host':14} {host:.1f} GB at least: offloaded moments, and a checkpoint that is written")
    if estimates.engine_size(cfg).num_gpus:
        e = estimates.engine_memory(cfg, spec, a)
        engine_fits = e.num_sequences >= 1 and e.total <= a.gpu_memory_gb * 1e9
        fits &= engine_fits
        lines.append(
            f"{'engine':14} {e.weights / 1e9:13.1f} weights, {e.kv_cache / 1e9:.1f} for keys and values: "
            f"{e.num_cached_tokens:,} tokens, or {e.num_sequences} sequences at once per replica; "
            f"total {e.total / 1e9:.1f} of {a.gpu_memory_gb:g}" + ("" if engine_fits else "  DOES NOT FIT")
        )
    return lines, fits


def time_table(cfg: Config, spec: ModelSpec, a: Assumptions) -> list[str]:
    """The stages and the whole run. SFT runs once, evaluation once per model, the others once per iteration.

    Stages on servers do not start them: `start servers` is for all stages in a row that ask one model.
    """
    found = estimates.stages(cfg, spec, a)
    lines = [f"{'stage':15} {'times':>5} {'Mtokens':>9} {'GPUs':>5} {'hours':>7} {'GPU-hours':>10} {'disk, GB':>9}"]
    total_hours = total_gpu_hours = total_disk = 0.0
    for s in found:
        lines.append(
            f"{s.name:15} {s.times:5} {s.num_tokens / 1e6:9.1f} {s.num_gpus:5} {s.hours:7.2f} {s.gpu_hours:10.1f} "
            f"{s.disk_bytes / 1e9:9.1f}"
        )
        total_hours += s.times * s.hours
        total_gpu_hours += s.times * s.gpu_hours
        total_disk += s.times * s.disk_bytes
    lines.append(
        f"{'whole run':15} {'':5} {'':9} {'':5} {total_hours:7.2f} {total_gpu_hours:10.1f} {total_disk / 1e9:9.1f}"
    )
    if queued := estimates.num_queued(cfg, found):
        hours = queued * a.queue_minutes / 60
        lines.append(f"and {hours:.2f} hours more in the queue ({counted(queued, 'job')}), where no GPU is held")
    # The last checkpoint, the one that is being written, and the weights that the training starts from.
    checkpoint = trainer_backend(cfg.trainer).checkpoint_bytes(cfg.trainer, spec)
    scratch = 2 * checkpoint + 4 * num_parameters(spec)
    lines.append(f"and {scratch / 1e9:,.0f} GB more while a training runs (two checkpoints, the starting weights)")
    if starts := estimates.num_server_starts(cfg):
        fewer, minutes, gpu_hours = estimates.saved_by_sharing(cfg, a)
        lines.append(
            f"servers start {starts} times; a start for each stage that asks a model would be {starts + fewer} times, "
            f"{minutes:.0f} minutes and {gpu_hours:.0f} GPU-hours more"
        )
    return lines


HELD = {
    "machine": "the GPUs of the stage of the moment, on one machine",
    "jobs": "the GPUs of the job of the moment (launcher=slurm). One allocation (launcher=srun) holds all of them",
    "allocation": "all GPUs from the beginning to the end (launcher=srun)",
}


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def main(overrides: list[str]) -> None:
    with cli.one_line_errors():
        cfg, a = compose_config(overrides)
        worker.set_up(cfg)
        spec = shape_of(cfg.model.path, cfg.model.cache_dir)
        check_shape(cfg, spec)
    t = cfg.trainer
    sizes = "".join(
        f"{getattr(t, f.name)} ({f.name.removesuffix('_parallel_size')}) x "
        for f in fields(t)
        if f.name.endswith("_parallel_size") and not f.name.startswith("virtual_")
    )
    print(f"model            {cfg.model.path}: {num_parameters(spec) / 1e9:.2f} billion parameters")
    gpus = counted(t.world_size, "GPU")
    print(f"training         {gpus} = {sizes}{t.data_parallel_size} (data); all sizes fit the model")
    if (e := estimates.engine_size(cfg)).num_gpus:
        of = f"TP {e.tensor_parallel_size} x PP {e.pipeline_parallel_size}; nodes: {e.num_nodes}"
        print(f"generation       {counted(e.num_gpus, 'GPU')} = {counted(e.num_replicas, 'replica')} of {of}")
    print(f"held             {HELD[estimates.holding(cfg)]}")
    memory, fits = memory_table(cfg, spec, a)
    print(
        "\n" + "\n".join(memory) + "\n\n" + "\n".join(time_table(cfg, spec, a)) + "\n\nassumed (set with ++assume.KEY=)"
    )
    print("\n".join(f"  {key} = {value:g}" for key, value in asdict(a).items()))
    if not fits:
        cli.fail(
            "the memory is too small. For a training, raise the parallel sizes, lower max_seq_length or "
            "trainer.micro_batch_size, or set trainer.recompute_granularity=full, trainer.optimizer_cpu_offload=true, "
            "trainer.frozen_share or trainer.lora_rank. For the embedded engine, lower engine.max_batch_size."
        )


if __name__ == "__main__":
    main(sys.argv[1:])
