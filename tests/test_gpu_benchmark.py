"""The GPU benchmark's arithmetic, its table and its JSON file. What it measures needs a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import gpu
import gpu_device
import gpu_dpo
import gpu_models
import pytest
import torch
from gpu_session import ROOT, Row, Session, table
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_srl.models.hf import read_shape


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(directory=tmp_path, output=tmp_path / "gpu.json", device="cpu", small=True, trl_path=None)


def script(tmp_path: Path, body: str) -> str:
    path = tmp_path / "measurement.py"
    path.write_text(f"import json, sys\ncase = json.load(open(sys.argv[1]))\n{body}\n")
    return str(path)


def test_the_flops_of_a_step_are_those_that_torch_counts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(gpu_models.TINY))
    spec = read_shape(tmp_path)
    lengths = (48, 96)
    with FlopCounterMode(display=False) as counter:
        model = LlamaForCausalLM(LlamaConfig(**gpu_models.TINY, attn_implementation="eager"))
        for length in lengths:
            model(torch.zeros(1, length, dtype=torch.long))
    counted = gpu_device.training_flops(spec, lengths, forward_passes=4)
    # torch does not count the norms, whose weights are in the number of parameters. It does count rotary angles.
    assert counted == pytest.approx(4 * counter.get_total_flops(), rel=2e-3)


def test_speed_is_that_of_the_median_step_after_the_warm_up(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(gpu_models.TINY))
    spec, lengths = read_shape(tmp_path), [60, 40]
    # Six steps: the first has no time, two more warm up, and the median of 2, 4 and 3 counts.
    found = {"step_seconds": [50.0, 40.0, 2.0, 4.0, 3.0], "memory": {"allocated": 5 * 10**9, "reserved": 6 * 10**9}}
    speed = gpu_dpo.speed(found, spec, lengths, num_warmup_steps=3, forward_passes=4, peak_tflops=2.0)
    assert (speed.step_seconds, speed.tokens_per_second) == (3.0, pytest.approx(100 / 3))
    flops = gpu_device.training_flops(spec, lengths, forward_passes=4)
    assert speed.mfu == pytest.approx(flops / 3.0 / 2e12)
    assert "5.0 GB allocated, 6.0 GB reserved" in str(speed)


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312), ("Some GPU", 123)],
)
def test_the_peak_of_a_known_gpu_is_its_data_sheets_and_that_of_another_is_measured(name: str, peak: float) -> None:
    found, source = gpu_device.peak_tflops(name, 123.0)
    assert (found, "measured" in source) == (peak, name == "Some GPU")


def test_pairs_have_the_lengths_that_are_counted_and_one_is_as_long_as_may_be(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    gpu_models.write_tokenizer(tmp_path, vocab_size=1024)
    pairs = gpu_models.make_pairs(tmp_path, num_pairs=5, max_length=64, seed=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    sequences = [row["prompt"] + row[side] for row in pairs["rows"] for side in ("chosen", "rejected")]
    assert [len(tokenizer.encode(text)) + 1 for text in sequences] == pairs["lengths"]  # and the end token
    assert max(pairs["lengths"]) == 64
    assert min(pairs["lengths"]) >= 32


def test_a_table_has_a_line_for_each_row_and_shows_what_is_not_reached() -> None:
    rows = [
        Row(part="a", name="x|y", result="two\nlines", goal="5 x", reached=False),
        Row(part="b", name="z", result="1", reached=True),
    ]
    lines = table(rows).splitlines()[2:]
    assert lines == ["| a | x/y | two lines | 5 x | NO |", "| b | z | 1 |  | yes |"]


def test_every_row_is_in_the_json_file_as_soon_as_it_is_there(session: Session, tmp_path: Path) -> None:
    session.about["machine"] = {"name": "a machine"}
    for part in ("one", "two"):
        session.begin(part, 60)
        session.add("speed", "7 s", goal="5 s", reached=False, values={"seconds": 7})
        written = json.loads((tmp_path / "gpu.json").read_text())
        assert written["machine"] == {"name": "a machine"}
        row = {"part": part, "name": "speed", "result": "7 s", "goal": "5 s", "reached": False, "failed": False}
        assert written["rows"][-1] == {**row, "values": {"seconds": 7}}
    assert len(written["rows"]) == 2


def test_a_measurement_that_fails_is_a_row_with_its_reason_and_the_next_one_goes_on(
    session: Session, tmp_path: Path
) -> None:
    session.begin("part", 60)
    assert session.measure("bad", script(tmp_path, "sys.exit('the disk is full')"), {}) is None
    good = script(tmp_path, "json.dump({'twice': 2 * case['n'], 'device': case['device']}, open(sys.argv[2], 'w'))")
    assert session.measure("good", good, {"n": 21}) == {"twice": 42, "device": "cpu"}
    assert [(row.name, row.result, row.failed) for row in session.rows] == [
        ("bad", "failed: exit status 1: the disk is full", True)
    ]


def test_a_part_that_fails_does_not_end_the_others(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = {"name": "m", "peak_tflops": 1.0, "peak_source": "", "matmul_tflops": 1.0, "python": "", "versions": {}}
    monkeypatch.setattr(session, "measure", lambda *args: machine)
    chosen = {
        "one": gpu.Part(lambda session: session.about["absent"], 0.5),
        "two": gpu.Part(lambda session: session.add("speed", "7 s"), 0.5),
    }
    gpu.run(session, chosen, seconds=60)
    assert [(row.part, row.result, row.failed) for row in session.rows[1:]] == [
        ("one", "failed: KeyError: 'absent'", True),
        ("two", "7 s", False),
    ]


def test_what_cannot_be_measured_here_is_left_out_and_is_no_failure(session: Session, tmp_path: Path) -> None:
    session.begin("part", 60)
    absent = script(tmp_path, "json.dump({'left_out': 'TRL is not installed'}, open(sys.argv[2], 'w'))")
    assert session.measure("TRL", absent, {}) is None
    assert [(row.result, row.failed) for row in session.rows] == [("left out: TRL is not installed", False)]


def test_a_measurement_ends_with_the_time_of_its_part(session: Session, tmp_path: Path) -> None:
    session.begin("part", 1)
    assert session.measure("endless", script(tmp_path, "print('step 7', flush=True)\nwhile True: pass"), {}) is None
    assert session.measure("too late", script(tmp_path, ""), {}) is None
    assert all(row.failed for row in session.rows)
    assert session.rows[0].result.startswith("failed: not done in 1 s.")
    assert session.rows[1].result == "failed: the time was over before it began"


def test_the_peers_see_their_own_packages_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/ours")
    trl_path = tmp_path / "trl"
    session = Session(directory=tmp_path, output=tmp_path / "gpu.json", device="cpu", small=True, trl_path=trl_path)
    session.begin("part", 60)
    path = script(tmp_path, "import os\njson.dump({'path': os.environ['PYTHONPATH']}, open(sys.argv[2], 'w'))")
    assert session.measure("peers", path, {}, peers=True) == {"path": str(trl_path)}
    assert session.measure("ours", path, {}) == {"path": f"{ROOT}:/ours"}
