"""Logged metrics are what they claim to be, and survive a kill."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from nemo_srl.trainers.nemo_aligner.metrics import MetricsFile, read_metrics, step_record
from nemo_srl.trainers.nemo_aligner.run import adopt_rank_environment


def log(metrics: MetricsFile, *steps: int) -> None:
    for step in steps:
        metrics.grad_norm, metrics.padding = 2.0 * step, 0.25
        metrics.log_metrics({"train/loss": 1.0 / step, "train/lr": 0.1}, step - 1)


def test_rewards_are_multiplied_by_beta() -> None:
    raw = {"loss": 0.5, "rewards_chosen_mean": 3.0, "rewards_rejected_mean": -1.0}
    record = step_record(raw, step=4, beta=0.1)
    assert record["rewards_chosen"] == pytest.approx(0.3)
    assert record["rewards_rejected"] == pytest.approx(-0.1)
    assert record["rewards_margin"] == pytest.approx(0.4)
    assert step_record({"loss": 0.5}, step=4, beta=None) == {"step": 4, "loss": 0.5}


def test_steps_count_from_one_and_carry_what_only_the_step_knows(tmp_path: Path) -> None:
    log(MetricsFile(tmp_path / "m", beta=None, first_step=0), 1, 2)
    assert read_metrics(tmp_path / "m") == [
        {"step": 1, "loss": 1.0, "lr": 0.1, "grad_norm": 2.0, "padding": 0.25},
        {"step": 2, "loss": 0.5, "lr": 0.1, "grad_norm": 4.0, "padding": 0.25},
    ]


def test_a_resumed_training_drops_the_steps_that_it_repeats(tmp_path: Path) -> None:
    log(MetricsFile(tmp_path / "m", beta=None, first_step=0), 1, 2, 3)
    with (tmp_path / "m").open("a") as file:
        file.write('{"step": 4, "lo')
    log(MetricsFile(tmp_path / "m", beta=None, first_step=2), 3, 4)
    assert [r["step"] for r in read_metrics(tmp_path / "m")] == [1, 2, 3, 4]


def test_a_new_training_starts_a_new_file(tmp_path: Path) -> None:
    log(MetricsFile(tmp_path / "m", beta=None, first_step=0), 1, 2)
    MetricsFile(tmp_path / "m", beta=None, first_step=0)
    assert read_metrics(tmp_path / "m") == []


def test_ranks_come_from_torchrun_from_slurm_or_from_nobody() -> None:
    torchrun = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": "2",
    }
    environ = dict(torchrun)
    adopt_rank_environment(environ)
    assert {k: environ[k] for k in torchrun} == torchrun
    slurm = {
        "SLURM_PROCID": "3",
        "SLURM_NTASKS": "4",
        "SLURM_LOCALID": "1",
        "MASTER_ADDR": "node1",
        "SLURM_NTASKS_PER_NODE": "2",
    }
    adopt_rank_environment(slurm)
    assert {k: slurm[k] for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK")} == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "GROUP_RANK": "1"
    }  # fmt: skip
    alone: dict[str, str] = {}
    adopt_rank_environment(alone)
    assert (alone["RANK"], alone["WORLD_SIZE"], alone["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")


def test_the_port_of_a_lone_rank_cannot_be_taken_and_torch_joins_it() -> None:
    program = """
        import errno, os, socket
        from nemo_srl.trainers.nemo_aligner.run import adopt_rank_environment

        adopt_rank_environment(os.environ)
        try:
            socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"])))
        except OSError as e:
            assert e.errno == errno.EADDRINUSE
        else:
            raise AssertionError("another process could take the port")

        import torch
        torch.distributed.init_process_group("gloo")
        total = torch.ones(1)
        torch.distributed.all_reduce(total)
        print(total.item(), torch.distributed.get_world_size())
    """
    ranks = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS"}
    env = {name: value for name, value in os.environ.items() if name not in ranks}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "1.0 1\n", done.stderr


def test_slurm_ranks_without_a_meeting_point_are_refused() -> None:
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        adopt_rank_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"})
