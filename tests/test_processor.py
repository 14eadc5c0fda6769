"""engine.dtype=auto and trainer.precision=auto: the number format in which the machine is fast."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_srl import processor
from nemo_srl.engines.embedded.settings import EmbeddedSettings
from nemo_srl.trainers.nemo_aligner.settings import NemoAlignerSettings
from tests.support import composed

UNITS = {
    "flags\t\t: fpu avx512f avx512_bf16 avx512_fp16": "bfloat16",
    "flags\t\t: fpu amx_bf16": "bfloat16",
    "Features\t: fp asimd bf16 i8mm": "bfloat16",
    "flags\t\t: fpu avx512f avx512_vnni": "float32",
    "model name\t: bf16 processor\nflags\t\t: fpu": "float32",
}


@pytest.mark.parametrize("cpuinfo", UNITS)
def test_bfloat16_where_the_processor_has_units_for_it(
    cpuinfo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{cpuinfo}\n")
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(processor.shutil, "which", lambda name: None)
    assert EmbeddedSettings(dtype="auto").dtype == UNITS[cpuinfo]
    assert EmbeddedSettings(dtype="auto", device="cuda").dtype == "bfloat16"
    assert EmbeddedSettings(dtype="float32", device="cuda").dtype == "float32"
    precision = {"bfloat16": "bf16", "float32": "32"}[UNITS[cpuinfo]]
    assert NemoAlignerSettings(precision="auto").precision == precision
    assert NemoAlignerSettings(precision="auto", platform="cuda").precision == "32"
    assert NemoAlignerSettings(precision="bf16-O2").precision == "bf16-O2"


def test_a_gpu_has_them_and_an_unknown_system_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "missing")
    monkeypatch.setattr(processor.shutil, "which", lambda name: None)
    assert EmbeddedSettings(dtype="auto").dtype == "float32"
    monkeypatch.setattr(processor.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert EmbeddedSettings(dtype="auto").dtype == "bfloat16"
    assert EmbeddedSettings(dtype="auto", device="cpu").dtype == "float32"
    assert NemoAlignerSettings(precision="auto").precision == "32"


def test_recipes_hold_what_was_decided() -> None:
    assert composed().engine.dtype in ("bfloat16", "float32")
    assert composed("engine.dtype=float32").engine.dtype == "float32"
    trainer = composed(recipe="srl-smollm2-135m-checked").trainer
    assert isinstance(trainer, NemoAlignerSettings)
    assert trainer.precision == ("bf16" if processor.has_bf16_units() and not processor.is_gpu("auto") else "32")
