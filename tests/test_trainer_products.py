"""Which library multiplies float32 matrices, and that a training keeps it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from nemo_srl.trainers.nemo_aligner.platforms import products
from nemo_srl.trainers.nemo_aligner.platforms.products import MKL, ONEDNN, choose, faster, measure, onednn_is_exact
from nemo_srl.trainers.nemo_aligner.training_plan import PLAN_FILE


@pytest.fixture(autouse=True)
def _precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """What the next measurements find, the last one first."""
    results: list[dict[str, float]] = []
    monkeypatch.setattr(products, "gflops", lambda *sizes: results.pop())
    return results


def work_dir(path: Path, *, hidden_size: int = 576, precision: str = "32") -> Path:
    model = {"hidden_size": hidden_size, "ffn_hidden_size": 4 * hidden_size}
    path.mkdir(exist_ok=True)
    OmegaConf.save(OmegaConf.create({"trainer": {"precision": precision}, "model": model}), path / PLAN_FILE)
    return path


@pytest.mark.parametrize(
    ("gflops", "library", "line"),
    [
        ({MKL: 100.0, ONEDNN: 200.4}, ONEDNN, f"float32 products by oneDNN (200 GFLOP/s; {MKL} 100)"),
        ({MKL: 150.0, ONEDNN: 110.0}, MKL, f"float32 products by {MKL} (150 GFLOP/s; oneDNN 110)"),
        ({MKL: 100.0, ONEDNN: 104.0}, MKL, f"float32 products by {MKL} (100 GFLOP/s; oneDNN 104)"),
        ({MKL: 100.0}, MKL, f"float32 products by {MKL} (100 GFLOP/s)"),
    ],
)
def test_the_faster_library_is_taken_and_named(
    measurements: list[dict[str, float]], tmp_path: Path, gflops: dict[str, float], library: str, line: str
) -> None:
    measurements.append(gflops)
    assert choose(work_dir(tmp_path)) == f"platform cpu: {line}"
    assert faster(gflops) == library
    assert torch.get_float32_matmul_precision() == {MKL: "highest", ONEDNN: "medium"}[library]


def test_a_training_that_goes_on_keeps_its_library(measurements: list[dict[str, float]], tmp_path: Path) -> None:
    measurements += [{MKL: 200.0, ONEDNN: 100.0}, {MKL: 100.0, ONEDNN: 200.0}]
    first = choose(work_dir(tmp_path))
    assert choose(work_dir(tmp_path)) == first
    assert len(measurements) == 1
    assert ONEDNN not in choose(work_dir(tmp_path / "another")).split("(")[0]


def test_on_another_machine_or_for_another_model_it_is_measured_again(
    measurements: list[dict[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measurements += 3 * [{MKL: 100.0, ONEDNN: 200.0}]
    first = choose(work_dir(tmp_path))
    choose(work_dir(tmp_path, hidden_size=960))
    assert len(measurements) == 1
    here = products._machine()
    monkeypatch.setattr(products, "_machine", lambda: {**here, "threads": here["threads"] + 1})
    choose(work_dir(tmp_path))
    assert not measurements
    monkeypatch.setattr(products, "_machine", lambda: here)
    assert choose(work_dir(tmp_path)) == first


def test_the_first_rank_decides(measurements: list[dict[str, float]], tmp_path: Path) -> None:
    """Two ranks that find no file measure at the same time. The one that is ready later takes the other's choice."""

    def other_rank(*sizes: int) -> dict[str, float]:
        measurements.append({MKL: 200.0, ONEDNN: 100.0})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(products, "gflops", lambda *sizes: measurements.pop())
            choose(tmp_path)
        return {MKL: 100.0, ONEDNN: 200.0}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "gflops", other_rank)
        assert f"by {MKL} (200" in choose(work_dir(tmp_path))
    (path,) = tmp_path.glob("products-*")
    assert json.loads(path.read_text())["gflops"] == {MKL: 200.0, ONEDNN: 100.0}


@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {"hidden_size": 64}])
def test_without_large_float32_products_nothing_is_measured(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert choose(work_dir(tmp_path, **settings)) == ""
    assert not list(tmp_path.glob("products-*"))


def test_libraries_take_turns_and_the_first_round_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    clock = [0.0]
    monkeypatch.setattr(products.time, "perf_counter", lambda: clock[0])

    def product() -> None:
        calls.append(torch.get_float32_matmul_precision())
        clock[0] += (100 if len(calls) <= 2 else 1) * (2 if calls[-1] == "highest" else 1)

    assert measure([MKL, ONEDNN], [product]) == {MKL: 2.0, ONEDNN: 1.0}
    assert calls == ["highest", "medium"] * 4


@pytest.mark.parametrize("exact", [True, False])
def test_an_inexact_onednn_is_not_measured(monkeypatch: pytest.MonkeyPatch, exact: bool) -> None:
    monkeypatch.setattr(products, "onednn_is_exact", lambda: exact)
    monkeypatch.setattr(products, "_SECONDS", 0.0)
    found = products.gflops(256, 512)
    assert set(found) == ({MKL, ONEDNN} if exact else {MKL})
    assert all(speed > 0 for speed in found.values())


def test_whether_onednn_is_exact_changes_nothing() -> None:
    torch.set_float32_matmul_precision("high")
    onednn_is_exact()
    assert torch.get_float32_matmul_precision() == "high"
