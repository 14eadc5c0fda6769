"""The line that tells a person at the start how long a run takes on this machine's CPU."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_srl import machine_time
from nemo_srl.chat import ChatTemplate
from nemo_srl.models import hf
from nemo_srl.records import EFTExample, IFTExample
from nemo_srl.workload import Assumptions
from tests.support import composed
from tests.tiny import make_model

IFT = [IFTExample(example_id="i", instruction="Name two fruits, please.", response="Apples and pears.")]
EFT = [EFTExample(example_id="e", instruction="Name a fruit.", response="A pear.", justification="It is one.", score=5)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), ["Name two fruits, please."], hidden_size=64)


def rates(gflops: float) -> dict[str, float]:
    return {"trained": gflops, "generated": gflops}


def test_lengths_are_those_of_the_seed_data(model: Path) -> None:
    cfg = composed()
    chat = ChatTemplate(model, chat_template=None)
    a = machine_time.assumptions(cfg, chat, IFT, EFT, ["Grade it: Name a fruit. A pear."])
    assert a.num_sft_rows == 2
    assert a.mean_prompt_tokens == chat.num_tokens(chat.render(IFT[0].instruction))
    assert a.mean_response_tokens == chat.num_tokens(IFT[0].response)
    without = machine_time.assumptions(cfg, chat, IFT, (), ())
    assert (without.num_sft_rows, without.mean_rubric_tokens) == (1, 0)


def test_what_rows_begin_with_counts_once(model: Path) -> None:
    cfg, spec, chat = composed(), hf.read_spec(model), ChatTemplate(model, chat_template=None)
    lessons = ["Grade it: a pear", "Grade it: an apple", "Grade it: two figs"]
    found = machine_time.shared_tokens(chat, [], lessons, share_of_lessons=1.0)
    assert found == chat.num_tokens(chat.render("Grade it: @").partition("@")[0])
    assert machine_time.shared_tokens(chat, ["Name it", "Say it"], lessons, share_of_lessons=0.5) < found
    a = Assumptions(num_sft_rows=100)
    assert machine_time.seconds(cfg, spec, a, rates=rates(1.0), shared=found) < machine_time.seconds(
        cfg, spec, a, rates=rates(1.0)
    )


def test_more_work_takes_longer_and_a_faster_machine_does_not(model: Path) -> None:
    cfg, spec, a = composed(), hf.read_spec(model), Assumptions(num_sft_rows=100)
    usual = machine_time.seconds(cfg, spec, a, rates=rates(1.0))
    assert machine_time.seconds(cfg, spec, a, rates=rates(2.0)) < usual
    assert machine_time.seconds(replace(cfg, num_iterations=4), spec, a, rates=rates(1.0)) > usual
    assert machine_time.seconds(cfg, spec, replace(a, num_sft_rows=200), rates=rates(1.0)) > usual


def test_the_line_gives_minutes_and_ways_to_less_work_only_where_the_cpu_computes(model: Path) -> None:
    line = machine_time.announcement(composed(), model, IFT, EFT)
    speeds = r"multiplies (\d+ GFLOP/s in (bfloat16|float32)( and )?)+"
    assert re.search(speeds + r", so a whole run takes about \d+ minutes\. Less work: ", line)
    composed(*(found := re.findall(r"[a-z_.]+=\d+", line)))
    assert len(found) == 3, "each way is a setting that a run accepts"
    assert machine_time.announcement(composed("launcher=slurm"), model, IFT, EFT) == ""
