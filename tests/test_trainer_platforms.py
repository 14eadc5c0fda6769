"""Which platform a training runs on, what is said where none works, and what takes the place of missing packages."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nemo_srl.errors import ConfigError
from nemo_srl.trainers.nemo_aligner.platforms import (
    Machine,
    check_context_parallel,
    check_offload,
    check_precision,
    check_tensor_overlap,
    choose,
    cpu,
    describe,
)
from nemo_srl.trainers.nemo_aligner.platforms.adam import FusedAdam
from nemo_srl.trainers.nemo_aligner.run import forget_attention_choice, out_of_memory
from nemo_srl.trainers.nemo_aligner.settings import NemoAlignerSettings

CPU = Machine(torch="2.13.0+cpu")
CUDA = Machine(
    torch="2.13.0", torch_cuda="13.0", gpus=("NVIDIA H100",), compute_capability=(9, 0), has_driver=True
)  # fmt: skip
NGC = replace(CUDA, transformer_engine="2.0", apex="0.1")


@pytest.mark.parametrize(
    ("wanted", "machine", "platform"),
    [
        ("auto", CPU, "cpu"),
        ("auto", CUDA, "cuda"),
        ("auto", NGC, "ngc"),
        ("cpu", NGC, "cpu"),
        ("cuda", NGC, "cuda"),
        ("cuda", replace(NGC, apex=None), "cuda"),
        ("ngc", NGC, "ngc"),
    ],
)
def test_the_platform_follows_what_is_installed_and_can_be_forced(wanted: str, machine: Machine, platform: str) -> None:
    assert choose(wanted, machine) == platform


@pytest.mark.parametrize(
    ("wanted", "machine", "message"),
    [
        (
            "auto",
            replace(NGC, apex=None),
            r"Engine 2\.0 is installed\. Apex is not.*trainer\.platform=cuda",
        ),
        ("auto", replace(NGC, transformer_engine=None), r"Apex 0\.1 is installed\. Transformer Engine is not"),
        ("ngc", CUDA, r"'ngc': Transformer Engine and Apex are not installed.*trainer\.platform=cuda"),
        ("cuda", CPU, r"torch 2\.13\.0\+cpu is a CPU build.*make TORCH=cuda install.*trainer\.platform=cpu"),
        ("cuda", replace(CUDA, gpus=(), has_driver=False), "no NVIDIA driver"),
        ("ngc", replace(CUDA, gpus=()), r"finds no usable GPU.*CUDA_VISIBLE_DEVICES=.*CUDA 13\.0"),
    ],
)
def test_a_platform_that_cannot_work_is_refused_with_the_remedy(wanted: str, machine: Machine, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose(wanted, machine)


def test_an_unknown_platform_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.platform='tpu'.*auto.*cpu.*cuda.*ngc"):
        NemoAlignerSettings(platform="tpu")


def test_bfloat16_is_refused_on_a_gpu_that_has_none() -> None:
    old = replace(CUDA, gpus=("Tesla T4",), compute_capability=(7, 5))
    with pytest.raises(ConfigError, match=r"trainer\.precision='bf16-O2': Tesla T4.*7\.5.*trainer\.precision=32"):
        check_precision("bf16-O2", "cuda", old)
    check_precision("32", "cuda", old)
    check_precision("bf16", "cuda", CUDA)
    check_precision("bf16", "cpu", CPU)


def test_the_log_names_the_platform_and_the_versions() -> None:
    packages = {"megatron-core": "0.11.0"}
    assert describe("cuda", CUDA, packages) == "platform cuda: 1 x NVIDIA H100; torch 2.13.0, megatron-core 0.11.0"
    assert describe("ngc", NGC, packages).endswith("transformer-engine 2.0, apex 0.1")
    assert describe("cpu", CPU, packages) == "platform cpu: CPU; torch 2.13.0+cpu, megatron-core 0.11.0"


def test_a_gpu_that_is_not_used_is_said() -> None:
    assert "has an NVIDIA driver, but torch 2.13.0+cpu is a CPU build" in describe(
        "cpu", replace(CPU, has_driver=True), {}
    )
    assert "trainer.platform=cpu was asked for" in describe("cpu", CUDA, {})


def test_a_full_gpu_names_the_setting_and_the_other_processes() -> None:
    message = out_of_memory(NemoAlignerSettings(micro_batch_size=4), int(1e9), int(80e9), int(60e9))
    assert "trainer.micro_batch_size=4" in message
    assert "This process has 60.0 of 80.0 GB" in message
    assert "Other processes have 19.0 GB" in message
    assert "Lower trainer.micro_batch_size" in message
    alone = out_of_memory(NemoAlignerSettings(), int(1e9), int(80e9), int(79e9))
    assert "Other processes" not in alone
    assert "Lower" not in alone
    assert "trainer.tensor_model_parallel_size" in alone
    assert "trainer.optimizer_cpu_offload=true" in alone
    offloaded = out_of_memory(NemoAlignerSettings(optimizer_cpu_offload=True), int(1e9), int(80e9), int(79e9))
    assert "optimizer_cpu_offload" not in offloaded
    assert "recipes/plan.py" in alone


def test_adam_makes_the_steps_of_the_formula() -> None:
    """AdamW as Loshchilov & Hutter 2019 write it, algorithm 2, with the schedule in `lr`."""
    lr, (beta1, beta2), eps, decay = 0.1, (0.9, 0.98), 1e-8, 0.1
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(3, 5, generator=generator)) for _ in range(2)]
    expected = [p.detach().clone() for p in parameters]
    moments = [[torch.zeros(3, 5), torch.zeros(3, 5)] for _ in parameters]
    adam = FusedAdam(parameters, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    for step in range(1, 5):
        for p, w, (m, v) in zip(parameters, expected, moments, strict=True):
            p.grad = torch.randn(3, 5, generator=generator)
            m.mul_(beta1).add_((1 - beta1) * p.grad)
            v.mul_(beta2).add_((1 - beta2) * p.grad**2)
            w.sub_(lr * (m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + eps) + decay * w))
        adam.step()
    assert adam.param_groups[0]["step"] == 4, "one count for the group, which a checkpoint can keep"
    for p, w, (m, v) in zip(parameters, expected, moments, strict=True):
        assert set(adam.state[p]) == {"exp_avg", "exp_avg_sq"}
        for actual, wanted in ((p.detach(), w), (adam.state[p]["exp_avg"], m), (adam.state[p]["exp_avg_sq"], v)):
            torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)


def test_moments_at_home_make_the_same_steps_and_stay_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def adam() -> FusedAdam:
        parameters = [torch.nn.Parameter(torch.ones(3, 5)), torch.nn.Parameter(torch.ones(2))]
        return FusedAdam(parameters, lr=0.1, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1)

    def step(adam: FusedAdam, scale: float) -> None:
        for p in adam.param_groups[0]["params"]:
            p.grad = scale * torch.arange(p.numel()).float().view_as(p)
        adam.step()

    usual = adam()
    monkeypatch.setattr(FusedAdam, "cpu_offload", True)
    offloaded = adam()
    offloaded.load_state_dict(offloaded.state_dict())  # as megatron-core does; it must find the moments from now on
    moments = [m for p in offloaded.param_groups[0]["params"] for m in offloaded.state[p].values()]
    assert len(moments) == 4
    for scale in (1.0, -2.0, 0.5):
        monkeypatch.setattr(FusedAdam, "cpu_offload", False)
        step(usual, scale)
        monkeypatch.setattr(FusedAdam, "cpu_offload", True)
        step(offloaded, scale)
        offloaded.load_state_dict(offloaded.state_dict())
    for ours, theirs in zip(*(x.param_groups[0]["params"] for x in (offloaded, usual)), strict=True):
        assert torch.equal(ours, theirs)
        assert all(
            torch.equal(offloaded.state[ours][key], usual.state[theirs][key]) for key in ("exp_avg", "exp_avg_sq")
        )
    assert offloaded.param_groups[0]["step"] == 3
    found = [m for p in offloaded.param_groups[0]["params"] for m in offloaded.state[p].values()]
    assert all(a is b for a, b in zip(found, moments, strict=True)), "the same memory, from the beginning to the end"


def test_moments_at_home_are_refused_where_nvidias_adam_trains() -> None:
    for refused in (
        lambda: check_offload(True, "ngc"),
        lambda: NemoAlignerSettings(platform="ngc", optimizer_cpu_offload=True),
    ):
        with pytest.raises(
            ConfigError, match=r"trainer\.optimizer_cpu_offload=True.*Set it to false, or.*platform=cuda"
        ):
            refused()
    for platform in ("cpu", "cuda"):
        check_offload(True, platform)
    check_offload(False, "ngc")


def test_user_buffers_are_refused_without_transformer_engine() -> None:
    for platform in ("cpu", "cuda"):
        with pytest.raises(ConfigError, match=r"trainer\.ub_tp_comm_overlap=True: .*Set it to false, or .*=ngc"):
            check_tensor_overlap(True, platform)
        check_tensor_overlap(False, platform)
    check_tensor_overlap(True, "ngc")


def test_context_parallelism_is_refused_where_attention_sees_one_rank_alone() -> None:
    for refused in (
        lambda: check_context_parallel(2, "cuda"),
        lambda: NemoAlignerSettings(platform="cpu", context_parallel_size=2),
    ):
        with pytest.raises(ConfigError, match=r"trainer\.context_parallel_size=2: .*Transformer Engine.*Set it to 1"):
            refused()
    check_context_parallel(2, "ngc")
    check_context_parallel(1, "cpu")
    shared = NemoAlignerSettings(context_parallel_size=2, tensor_model_parallel_size=2, devices=8)
    assert (shared.data_parallel_size, NemoAlignerSettings(context_parallel_size=2).world_size) == (2, 2)


def test_no_other_platform_is_imported() -> None:
    code = (
        "import sys\nfrom nemo_srl.trainers.nemo_aligner import platforms\n"
        "platforms.load(platforms.choose('auto', platforms.Machine()))\n"
        "print(*[name.rpartition('.')[2] for name in sys.modules if name.startswith(platforms.__name__ + '.')])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert sorted(found.split()) == ["cpu", "functions", "products", "stand_ins"]


def test_without_transformer_engine_and_apex_a_gpu_gets_our_layers_and_keeps_its_own_cuda() -> None:
    """The platform `cuda`, installed on a machine without one: what it replaces, and what it leaves."""
    code = """
import torch
devices = torch.cuda.current_device, torch.cuda.Stream, torch.Tensor.cuda, torch.autocast
from nemo_srl.trainers.nemo_aligner.platforms import cuda
cuda.install()
import megatron.core.optimizer as optimizer
import nemo.collections.nlp.parts.nlp_overrides as overrides
from megatron.core.extensions import transformer_engine
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from nemo_srl.trainers.nemo_aligner.platforms import adam, modules, stand_ins
assert transformer_engine.TENorm is modules.Norm
assert optimizer.Adam is adam.FusedAdam
assert overrides.HAVE_APEX
assert FileSystemWriterAsync.write_preloaded_data_multiproc.__module__ == stand_ins.__name__
assert devices == (torch.cuda.current_device, torch.cuda.Stream, torch.Tensor.cuda, torch.autocast)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_sites_choice_of_attention_does_not_end_megatron_core(capsys: pytest.CaptureFixture[str]) -> None:
    environ = {"RANK": "0", "NVTE_FLASH_ATTN": "0", "NVTE_UNFUSED_ATTN": "1", "NVTE_DEBUG": "1"}
    forget_attention_choice(environ)
    assert environ == {"RANK": "0", "NVTE_DEBUG": "1"}
    assert "NVTE_FLASH_ATTN=0, NVTE_UNFUSED_ATTN=1: not used" in capsys.readouterr().err
    code = """
import os
from types import SimpleNamespace
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.enums import AttnBackend
from nemo_srl.trainers.nemo_aligner.run import forget_attention_choice
forget_attention_choice(os.environ)
LanguageModule._set_attention_backend(SimpleNamespace(config=SimpleNamespace(attention_backend=AttnBackend.auto)))
"""
    site = {**os.environ, "RANK": "1", "NVTE_FUSED_ATTN": "0"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=site)
    assert done.returncode == 0, done.stderr
    assert "NVTE" not in done.stderr, "one rank says so"


def test_a_stop_request_leaves_the_manager_of_checkpoints_alive(tmp_path: Path) -> None:
    """In NVIDIA's containers, where megatron-core's own writers report through a process of their own."""
    program = tmp_path / "program.py"
    program.write_text("""
import os, signal, time

if __name__ == "__main__":
    from nemo_srl.trainers.nemo_aligner.platforms import ngc
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem

    ngc.keep_manager_through_a_stop()
    queue = filesystem._get_write_results_queue()
    queue.put("first save")
    os.kill(queue._manager._process.pid, signal.SIGTERM)
    time.sleep(0.5)
    assert filesystem._get_write_results_queue() is queue
    queue.put("second save")
    print(queue.get(), queue.get(), sep=", ")
""")
    command = [sys.executable, "-W", "ignore", str(program)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout == "first save, second save\n", done.stderr[-2000:]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the page faults of Linux")
def test_on_a_cpu_freed_memory_is_used_again_without_new_pages() -> None:
    """Tensors of 60 MB, 15,360 pages, that are freed at once. The kernel may take back some of what is kept."""

    def num_new_pages(keep: str) -> int:
        code = f"""
import resource
import torch
from nemo_srl.trainers.nemo_aligner.platforms import cpu
torch.set_num_threads(1)
{keep}
torch.ones(16 * 2**20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(16):
    torch.ones(15 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
        environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "0"}  # pages of 4 kB
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        return int(done.stdout)

    assert num_new_pages("cpu.keep_freed_memory()") < num_new_pages("") / 1.5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_a_gather_of_one_rank_starts_no_threads() -> None:
    """gloo's thread starts some for a long message, and they slow down all that comes later."""

    def num_new_threads(gather: str) -> int:
        code = f"""
import os, torch, torch.distributed as dist
from nemo_srl.trainers.nemo_aligner.platforms import cpu
{gather}
torch.set_num_threads(2)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
torch.ones(10**6).mul_(2)
found, message = [None], "a message " * 5000
before = len(os.listdir("/proc/self/task"))
dist.all_gather_object(found, message)
assert found == [message]
print(len(os.listdir("/proc/self/task")) - before)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert num_new_threads("cpu.gather_without_gloo_if_alone()") == 0 < num_new_threads("")


def test_a_gather_of_one_rank_copies_nothing_and_others_go_through() -> None:
    calls: list[dict[str, object]] = []
    gather = cpu.skip_if_alone(lambda output, input, **kwargs: calls.append(kwargs))
    alone, two = (SimpleNamespace(size=lambda n=n: n) for n in (1, 2))
    buffer, target = torch.arange(4.0), torch.zeros(4)
    gather(buffer, buffer[:], group=alone, async_op=False)
    assert buffer.tolist() == [0, 1, 2, 3]
    gather(target, buffer, group=alone, async_op=False)
    assert target.tolist() == [0, 1, 2, 3]
    assert not calls
    gather(target, buffer, group=two, async_op=False)
    assert calls == [{"group": two, "async_op": False}]
