"""The line that tells a person at the start how long a run takes on this machine's CPU."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_srl import machine_time
from nemo_srl.chat import ChatTemplate
from nemo_srl.config import Config
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
    answers = [("Name it", "A pear."), ("Say it", "A fig.")]
    lessons = [("Grade it: a pear", "Score: 5"), ("Grade it: an apple", "Score: 4"), ("Grade it: two figs", "Score: 3")]
    rows = machine_time.row_tokens(chat, answers, lessons, 0.75)
    tokens = [
        [chat.num_tokens(chat.render(prompt)) + chat.num_tokens(response) for prompt, response in kind]
        for kind in (answers, lessons)
    ]
    assert rows.sft == pytest.approx(0.25 * sum(tokens[0]) / 2 + 0.75 * sum(tokens[1]) / 3 + 1)
    assert rows.begun_judging == chat.num_tokens(chat.render("Grade it: @").partition("@")[0])
    assert rows.begun_answering == chat.num_tokens(chat.render("@").partition("@")[0]) < rows.begun_judging
    assert rows.begun(0.5) == (rows.begun_answering + rows.begun_judging) / 2
    nothing = replace(rows, begun_answering=0.0, begun_judging=0.0)
    a = Assumptions(num_sft_rows=100)
    took = [machine_time.seconds(cfg, spec, a, rates=rates(1.0), rows=x) for x in (rows, nothing)]
    assert took[0] < took[1]
    assert machine_time.row_tokens(chat, answers, (), 0.0).begun_judging == 0, "without EFT"


def test_what_rows_of_a_group_have_in_common_counts_once(model: Path) -> None:
    cfg, spec, chat = composed(), hf.read_spec(model), ChatTemplate(model, chat_template=None)
    shared = "Grade it: what is a pear and how does it grow? "
    prompts = [shared + "A fig.", shared + "A tree.", "Grade it: how tall is a tree in the mean? It is tall."]
    common, tokens = chat.num_tokens("Grade it: "), chat.num_tokens(shared)
    # One of three prompts begins as the one before it.
    alike = machine_time.tokens_alike(chat, prompts)
    assert alike == pytest.approx((tokens - common) / 3, rel=0.15)
    assert machine_time.tokens_alike(chat, ()) == machine_time.tokens_alike(chat, prompts[1:]) == 0
    rows = machine_time.RowTokens(share_of_judging=1, sft=90, begun_answering=0, begun_judging=40, alike_judging=alike)
    a, times = Assumptions(num_sft_rows=100), []
    for together in (1, 2, 8):
        changed = replace(cfg, sft=replace(cfg.sft, rows_together=together))
        times.append(machine_time.seconds(changed, spec, a, rates=rates(1.0), rows=rows))
    assert times[0] > times[1] > times[2]


def test_more_work_takes_longer_and_a_faster_machine_does_not(model: Path) -> None:
    cfg, spec, a = composed(), hf.read_spec(model), Assumptions(num_sft_rows=100)
    rows = machine_time.RowTokens(share_of_judging=0.5, sft=100.0, begun_answering=10.0, begun_judging=40.0)

    def took(cfg: Config, a: Assumptions, gflops: float = 1.0) -> float:
        return machine_time.seconds(cfg, spec, a, rates=rates(gflops), rows=rows)

    usual = took(cfg, a)
    assert took(cfg, a, 2.0) < usual
    assert took(replace(cfg, num_iterations=4), a) > usual
    assert took(cfg, replace(a, num_sft_rows=200)) > usual
    trained = machine_time.seconds(cfg, spec, a, rates={"trained": 2.0, "generated": 1.0}, rows=rows)
    assert took(cfg, a, 2.0) < trained < usual


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_faster_products_make_a_training_faster_up_to_what_is_no_product(dtype: str) -> None:
    slow, fast, fastest = (machine_time.training_gflops(dtype, gflops) for gflops in (100.0, 200.0, 1e9))
    assert slow < fast < 2 * slow
    assert fast < fastest == pytest.approx(machine_time.OTHERS_GFLOPS[dtype])


def test_the_line_gives_minutes_and_ways_to_less_work_only_where_the_cpu_computes(model: Path) -> None:
    line = machine_time.announcement(composed(), model, IFT, EFT)
    speeds = r"multiplies (\d+ GFLOP/s in (bfloat16|float32)( and )?)+"
    assert re.search(speeds + r", so a whole run takes about \d+ minutes\. Less work: ", line)
    composed(*(found := re.findall(r"[a-z_.]+=\d+", line)))
    assert len(found) == 3, "each way is a setting that a run accepts"
    assert machine_time.announcement(composed("launcher=slurm"), model, IFT, EFT) == ""
