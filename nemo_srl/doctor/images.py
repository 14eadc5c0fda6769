"""What runs inside the containers and is not a probe: the record of TensorRT-LLM's names, and tests of the conversion.

`python -m nemo_srl.doctor.images OUTPUT NEEDED_MODULE ARGUMENTS` runs the interpreter of the container once more,
and writes its exit status and its output as JSON. So the output of a container's entry point is not mixed in.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_srl import jsonio
from nemo_srl.artifacts import write_atomic
from nemo_srl.doctor.findings import Finding, not_checked
from nemo_srl.errors import NemoSrlError
from nemo_srl.protocols import JobRole, JobStep

if TYPE_CHECKING:
    from nemo_srl.doctor.site import Site

CONTRACT = "contract"
TESTS = "tests/test_models_convert.py"
REMEDY_CONTRACT = (
    "This version of TensorRT-LLM has other names than the project knows. Use the image of "
    "containers/trtllm.Dockerfile (1.2.1), or follow the error in nemo_srl/engines/trtllm/."
)
REMEDY_TESTS = (
    "The conversion between Hugging Face and NeMo is not exact with this container's torch. Do not train with it. Use "
    "the image of containers/nemo.Dockerfile, or compare its packages with requirements.lock."
)


def check_contract(site: Site) -> Iterator[Finding]:
    """Record TensorRT-LLM's names, keep the record beside the report, and compare it with the project's own."""
    from nemo_srl.doctor.site import PROJECT_ROOT

    script = PROJECT_ROOT / "containers" / "record_trtllm_contract.py"
    tried = "containers/record_trtllm_contract.py in the engine's container"
    if site.cfg.engine.name != "trtllm":
        yield not_checked(CONTRACT, f"the recipe has engine={site.cfg.engine.name}", tried=tried)
        return
    done = run(site, CONTRACT, "engine", [str(script)])
    if done["status"]:
        text = f"exit status {done['status']}: {_last_lines(done['stderr'])}"
        yield Finding(name=CONTRACT, ok=False, text=text, tried=tried, remedy=REMEDY_CONTRACT)
        return
    recorded = json.loads(done["stdout"])
    path = site.write(f"trtllm-{recorded['version']}.json", recorded)
    known = newest_contract(PROJECT_ROOT / "tests" / "contracts")
    gone = missing_names(known, recorded)
    text = f"TensorRT-LLM {recorded['version']}, recorded in {path.name}"
    text += f"; known names that it lacks: {', '.join(gone)}" if gone else "; it has all names that the project knows"
    remedy = f"Copy {path} to tests/contracts/, and run tests/test_engine_trtllm.py with it." if gone else ""
    # A name that nobody uses may go. `serving` shows whether one that is used is gone.
    yield Finding(name=CONTRACT, ok=True, text=text, tried=tried, remedy=remedy)


def check_conversion(site: Site) -> Iterator[Finding]:
    """Run the tests of the conversion inside the trainer's container."""
    from nemo_srl.doctor.site import PROJECT_ROOT

    name, tried = "conversion", f"{TESTS} in the trainer's container"
    if not (PROJECT_ROOT / TESTS).is_file():
        yield not_checked(name, f"{PROJECT_ROOT} has no tests: this is not a checkout", tried=tried)
        return
    # The project's own options for pytest name plug-ins that an image lacks.
    options = ["-q", "-c", "/dev/null", f"--rootdir={PROJECT_ROOT}", "-p", "no:cacheprovider", "-W", "ignore"]
    done = run(site, name, "trainer", ["-m", "pytest", *options, str(PROJECT_ROOT / TESTS)], needs="pytest")
    if done["status"] is None:
        remedy = "pip install --target=DIRECTORY pytest on shared storage, and set +cluster.env.PYTHONPATH=DIRECTORY."
        yield not_checked(name, "the container has no pytest", tried=tried, remedy=remedy)
        return
    text, ok = _last_lines(done["stdout"] or done["stderr"], 1 if not done["status"] else 15), not done["status"]
    yield Finding(name=name, ok=ok, text=text, tried=tried, remedy="" if ok else REMEDY_TESTS)


def run(site: Site, name: str, role: JobRole, arguments: Sequence[str], *, needs: str = "") -> Any:
    """Run the container's Python with `arguments`: exit status, stdout and stderr. Status None: it lacks `needs`."""
    output = site.directory / f"{name}-output.json"
    command = ["-m", "nemo_srl.doctor.images", str(output), needs, *arguments]
    # TensorRT-LLM's import may need a GPU.
    site.run(site.job(name, [JobStep(name=name, command=command)], role=role, num_gpus_per_node=1))
    return site.read(output.name)


def newest_contract(directory: Path) -> Mapping[str, Any]:
    """The recorded names that the project was written for."""
    found = sorted(directory.glob("trtllm-*.json"))
    if not found:
        raise NemoSrlError(f"{directory} has no trtllm-*.json: this is not a checkout")
    contract: Mapping[str, Any] = json.loads(found[-1].read_text())
    return contract


def missing_names(known: Mapping[str, Any], recorded: Mapping[str, Any]) -> list[str]:
    """Names of the known lists that the recorded ones lack, as `section.name`."""
    return [
        f"{section}.{name}"
        for section, names in known.items()
        if isinstance(names, list)
        for name in names
        if name not in recorded.get(section, [])
    ]


def _last_lines(text: str, number: int = 15) -> str:
    return "\n".join(text.strip().splitlines()[-number:])


def main(output: Path, needs: str, arguments: Sequence[str]) -> None:
    if needs and importlib.util.find_spec(needs) is None:
        write_atomic(output, jsonio.dumps({"status": None, "stdout": "", "stderr": ""}))
        return
    done = subprocess.run([sys.executable, *arguments], text=True, capture_output=True, cwd=Path(__file__).parents[2])
    found = {"status": done.returncode, "stdout": done.stdout, "stderr": done.stderr}
    write_atomic(output, jsonio.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
