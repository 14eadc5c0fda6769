"""Which library multiplies float32 matrices on a CPU: MKL or oneDNN. The faster one here, by a measurement.

oneDNN was twice as fast on AMD's Zen 4 and Zen 5. MKL was 1.2 to 1.7 times as fast in the backward pass on an Intel
Xeon without bfloat16 units. The two differ in the last digits of a result. So a training must not change its library
when it goes on after an interruption. Its first start writes the choice into the work directory, in a file for this
kind of machine. Every later start on such a machine reads it there, and so do the other ranks.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from nemo_srl import jsonio
from nemo_srl.artifacts import digest_of, read_json
from nemo_srl.trainers.nemo_aligner.training_plan import PLAN_FILE

ONEDNN = "oneDNN"
MKL = "MKL" if torch.backends.mkl.is_available() else "BLAS"  # type: ignore[no-untyped-call]
"""PyTorch's own choice. It is kept unless oneDNN is clearly faster."""
_PRECISION = {MKL: "highest", ONEDNN: "medium"}
_MIN_GAIN = 1.05
_NUM_ROWS = 1024
_MIN_SIZE, _MAX_SIZE = 256, 1536
_MIN_ROUNDS, _SECONDS = 3, 0.8


def choose(work_dir: Path) -> str:
    """Let PyTorch use the faster library in this process. Returns a line for the log, "" if nothing was chosen.

    Nothing is chosen for a training in bfloat16, which has no such products, and for a model so small that they take
    little of the time.
    """
    plan = OmegaConf.load(work_dir / PLAN_FILE)
    sizes = (plan.model.hidden_size, plan.model.ffn_hidden_size)
    if plan.trainer.precision != "32" or min(sizes) < _MIN_SIZE:
        return ""
    machine = {**_machine(), "sizes": sizes}
    path = work_dir / f"products-{digest_of(machine)}.json"
    if not path.exists():
        _publish(path, {"gflops": gflops(*sizes), "machine": machine})
    found = read_json(path)["gflops"]
    library = faster(found)
    use(library)
    others = "".join(f"; {name} {found[name]:.0f}" for name in found if name != library)
    return f"platform cpu: float32 products by {library} ({found[library]:.0f} GFLOP/s{others})"


def use(library: str) -> None:
    """PyTorch takes oneDNN only when it may lower the precision, which oneDNN does not do where `onednn_is_exact`."""
    torch.set_float32_matmul_precision(_PRECISION[library])


def onednn_is_exact() -> bool:
    """Whether oneDNN multiplies in float32 when it may do less. With AMX it takes bfloat16 instead."""
    before = torch.get_float32_matmul_precision()
    use(ONEDNN)
    just_above_one = torch.full((64, 64), 1 + 2**-20)  # rounds to 1 in bfloat16 and TF32
    exact = torch.equal(just_above_one @ torch.eye(64), just_above_one)
    torch.set_float32_matmul_precision(before)
    return exact


def faster(found: dict[str, float]) -> str:
    """oneDNN only where it is clearly faster, so that noise does not decide between equals."""
    return ONEDNN if found.get(ONEDNN, 0.0) > _MIN_GAIN * found[MKL] else MKL


def measure(libraries: list[str], products: list[Callable[[], Any]]) -> dict[str, float]:
    """Median seconds for one call of each of `products`, by library. They take turns, so that all see the same noise.

    The first round warms up: oneDNN compiles its kernels then.
    """
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in products] for name in libraries}
    start, num_rounds = time.perf_counter(), 0
    while num_rounds <= _MIN_ROUNDS or time.perf_counter() - start < _SECONDS:
        for name in libraries:
            use(name)
            for times, product in zip(seconds[name], products, strict=True):
                before = time.perf_counter()
                product()
                times.append(time.perf_counter() - before)
        num_rounds += 1
    return {name: sum(statistics.median(times[1:]) for times in of_name) for name, of_name in seconds.items()}


def gflops(hidden_size: int, ffn_hidden_size: int, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """GFLOP/s by library of a feed-forward layer, over its forward product and those for both gradients."""
    size_in, size_out = min(hidden_size, _MAX_SIZE), min(ffn_hidden_size, _MAX_SIZE)
    shapes = ((_NUM_ROWS, size_in), (size_out, size_in), (_NUM_ROWS, size_out))
    x, weight, gradient = (torch.ones(shape, dtype=dtype) for shape in shapes)
    y, of_x, of_weight = torch.empty_like(gradient), torch.empty_like(x), torch.empty_like(weight)
    products: list[Callable[[], Any]] = [
        lambda: torch.mm(x, weight.t(), out=y),
        lambda: torch.mm(gradient, weight, out=of_x),
        lambda: torch.mm(gradient.t(), x, out=of_weight),
    ]
    libraries = [MKL, ONEDNN] if dtype == torch.float32 and onednn_is_exact() else [MKL]
    giga_operations = len(products) * 2 * _NUM_ROWS * size_in * size_out / 1e9
    return {name: giga_operations / seconds for name, seconds in measure(libraries, products).items()}


def _machine() -> dict[str, Any]:
    """What decides which library is faster here."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n")[0].splitlines() if info.exists() else [platform.processor()]
    names = ("vendor_id", "cpu family", "model", "stepping", "flags")
    cpu = {key: value for key, _, value in (line.partition("\t") for line in lines) if key.strip() in names}
    return {"cpu": cpu or lines, "torch": torch.__version__, "threads": torch.get_num_threads()}


def _publish(path: Path, content: dict[str, Any]) -> None:
    """Write the file, complete or not at all. If another rank was first, its file stays."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(jsonio.dumps(content, indent=2) + "\n")
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
