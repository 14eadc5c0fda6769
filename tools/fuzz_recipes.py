"""Calls every program in recipes/ with wrong arguments and damaged files: `python -m tools.fuzz_recipes minutes=20`.

    python -m tools.fuzz_recipes minutes=20 seed=1 output=benchmarks/results/fuzz-2026-11-26.json
    python -m tools.fuzz_recipes case=1234             # one case again, with its arguments and what it printed
    setpriv --bounding-set=-dac_override,-dac_read_search python -m tools.fuzz_recipes    # root may read any file

A call may end in success, or with exit status 2 and a message that begins with `error:`. A traceback, another status or
a call that takes minutes is a failure. All calls run in this process, as `python recipes/<name>.py` would run them. A
job is not started: a call that gets so far is a success.
"""

from __future__ import annotations

import collections
import contextlib
import gzip
import io
import json
import os
import random
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.global_hydra import GlobalHydra

from nemo_srl import cli
from nemo_srl.artifacts import write_atomic
from nemo_srl.config import Config
from nemo_srl.doctor import cluster, machine
from nemo_srl.launchers.local import LocalLauncher
from tests import run_directory, test_oasst, tiny

ROOT = Path(__file__).resolve().parent.parent
SECONDS_PER_CALL = 180


@dataclass
class Options:
    minutes: float = 20
    seed: int = 1
    case: int = -1
    """The number of the one case that is run. -1: as many as there is time for."""
    num_cases: int = 0
    """End after so many cases, even if there is time. 0: no limit."""
    output: str = ""
    """The file of results. Empty: they are only printed."""


@dataclass
class Outcomes:
    num_cases: int = 0
    by_recipe: dict[str, Counter[str]] = field(default_factory=lambda: collections.defaultdict(Counter))
    failures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By what went wrong and where: how often, and the first case."""


# Arguments. `{d}` is the case's own copy of the materials.
RECIPES: dict[str, list[str]] = {
    "iterate": ["run_dir={d}/new", "model.path={d}/model", "data.ift_path={d}/ift.jsonl",
                "data.eft_path={d}/eft.jsonl", "data.eft_eval_path={d}/eft_eval.jsonl"],
    "evaluate": ["run_dir={d}/new", "++evaluate.models={m: {d}/model, a: {d}/answers.json}",
                 "evaluate.questions={d}/questions.json", "data.eft_eval_path={d}/eft_eval.jsonl"],
    "build_eft": ["run_dir={d}/new", "model.path={d}/model", "data.ift_path={d}/ift.jsonl",
                  "data.rankings_path={d}/rankings.jsonl"],
    "plan": ["model.path={d}/model"],
    "status": ["run_dir={d}/run"],
    "report": ["run_dir={d}/run"],
    "export": ["run_dir={d}/run", "output_dir={d}/out", "model=none"],
    "doctor": ["work_dir={d}/doctor"],
    "prepare_seed": ["input={d}/chats.jsonl", "output={d}/out/ift.jsonl"],
    "prepare_oasst": ["trees={d}/oasst.trees.jsonl.gz", "output_dir={d}/out", "num_ift=9", "num_eft=5",
                      "num_eft_eval=3"],
    "build_checked_seed": ["input_dir={d}/checked", "output_dir={d}/out", "seed_dir={d}", "num_eft=8"],
}  # fmt: skip
MORE = {
    "iterate": ["prompts.path={d}/prompts.jsonl", "data.rankings_path={d}/rankings.jsonl", "anchor.model={d}/model",
                "prompts.model={d}/model", "run_dir={d}/run", "+judge_mode=pairwise", "recipe=srl-smollm2-135m-1gpu",
                "engine=openai", "engine=trtllm", "launcher=slurm", "launcher=srun", "cluster=bare-metal",
                "prompts.path={d}/prompts-{iteration}.jsonl"],
    "evaluate": ["evaluate.questions=", "evaluate.questions={d}/mt_bench.jsonl", "evaluate.ifeval={d}/ifeval.jsonl",
                 "evaluate.judge_model={d}/model", "evaluate.judging=false", "run_dir={d}/comparison",
                 "++evaluate.models={a: {d}/answers.json}", "++evaluate.models={}", "++evaluate.models=[]"],
    "build_eft": ["engine=openai"],
    "plan": ["recipe=srl-llama2-70b-8n8g-tp8pp4", "recipe=srl-smollm2-135m-1gpu", "++assume.gpu_memory_gb=1",
             "engine=trtllm"],
    "report": ["run_dir={d}/comparison", "run_dir={d}"],
    "export": ["formats=[trl,nemo_rl]", "iterations=[1]", "iterations=[7]", "model=last", "model=M2", "license=mit"],
    "doctor": ["platform=cpu", "platform=tpu", "recipe=srl-smollm2-135m-1gpu", "cluster=bare-metal", "launcher=slurm",
               "engine=trtllm", "trainer.num_nodes=2"],
    "prepare_oasst": ["language=de", "max_characters=1"],
}  # fmt: skip
VALUES = [
    "", "null", "-1", "0", "1", "2", "1e999", "nan", "-.inf", "true", "[]", "{}", "[1,2]", "{a: 1}", "9" * 30, "x",
    "\u00e9\U0001f642", "'", '"', "[", "}", "${x}", "${run_dir}", "${oc.env:HOME}", "${", "???", "a=b", "a,b", "  ",
    "\\", "\n", "0x1f", "1_000", "{d}", "{d}/none", "{d}/ift.jsonl/below", "{d}/loop", "os:getcwd", "os:nothing",
    "no.such:thing", "nemo_srl.stages:LOOP", "M1", "last", "{0}", "{iteration}", "0.5", "100000", "embedded", "../..",
    "~", "choice(1,2)", "range(3)", "x" * 300,
]  # fmt: skip
FLAGS = [
    "--help", "--cfg", "job", "--resolve", "--multirun", "--info", "--config-name=x", "--unknown", "-c", "--version",
    "--package=a", "--hydra-help", "--config-dir={d}", "--config-path=/nowhere", "--experimental-rerun=x", "=", "x",
    "+", "--",
]  # fmt: skip
ODD_KEYS = ["hydra.run.dir", "engine@judge.engine", "assume.x", "recipe", "engine", "judge", "cluster"]
JUNK: list[Any] = [
    None, "", " ", [], {}, -1, 0, 7, 1.5, 1e300, True, "x", [None], {"a": 1}, "\u00e9", "\x00", 10**30, [[[]]],
    ["2", "3"],
]  # fmt: skip


def keys_of(value: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """All settings by their dotted paths, sections included."""
    for name, child in value.items():
        yield prefix + name
        if isinstance(child, dict):
            yield from keys_of(child, f"{prefix}{name}.")


def make_materials(directory: Path) -> Path:
    """One valid input for each program."""
    tiny.write_seed(directory)
    tiny.make_model(directory / "model", tiny.texts_of(directory))
    run_directory.make_run(directory / "run", num_prompts=6)
    run_directory.make_comparison(directory / "comparison", num_questions=6)
    instructions = [f"Name thing {i}." for i in range(4)]
    rows: dict[str, list[Any]] = {
        "ifeval": [{"key": 1, "prompt": "Say.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}],
        "prompts": [], "rankings": [], "chats": [], "mt_bench": [],
    }  # fmt: skip
    for i, x in enumerate(instructions):
        rows["prompts"].append({"prompt_id": str(i), "text": x})
        rows["rankings"].append({"example_id": str(i), "instruction": x, "responses": ["a", "b"], "ranks": [0, 1]})
        rows["chats"].append({"messages": [{"role": r, "content": x} for r in ("user", "assistant")]})
        rows["mt_bench"].append({"question_id": i, "category": "x", "turns": [x, "And?"]})
    for name, found in rows.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    asked = [{"instruction": x, "output": "It.", "generator": "g", "dataset": "d"} for x in instructions]
    for name in ("questions", "answers"):
        (directory / f"{name}.json").write_text(json.dumps(asked))
    test_oasst.write(directory / "oasst.trees.jsonl.gz", test_oasst.many(30))
    shutil.copytree(ROOT / "data" / "checked", directory / "checked")
    tasks = directory / "checked" / "tasks.jsonl"  # some of them are enough, and much faster
    tasks.write_bytes(b"".join(tasks.read_bytes().splitlines(keepends=True)[::12]))
    for stage in ("iter_00/sft", "iter_01/policy", "iter_02/policy"):
        shutil.copytree(directory / "model", directory / "run" / stage / "hf")
    return directory


class Case:
    """One call: its copy of the materials, what is damaged in it, and its arguments. The same for the same number."""

    def __init__(self, number: int, seed: int, materials: Path, directory: Path, keys: Sequence[str]) -> None:
        self.rng = random.Random(f"{seed}:{number}")
        self.recipe = self.rng.choice(list(RECIPES))
        self.directory, self.damage, self._keys = directory, [], keys
        shutil.copytree(materials, directory)
        (directory / "loop").symlink_to(directory / "loop")
        for _ in range(self.rng.choice((0, 1, 1, 2))):
            self.damage.append(self._damage_one())
        self.arguments = [x.replace("{d}", str(directory)) for x in self._arguments()]

    def _arguments(self) -> list[str]:
        rng, given = self.rng, list(RECIPES[self.recipe])
        for _ in range(rng.choice((0, 0, 1))):
            del given[rng.randrange(len(given))]
            if not given:
                break
        extra = MORE.get(self.recipe, [])
        given += rng.sample(extra, min(len(extra), rng.choice((0, 0, 1, 1, 2))))
        for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
            given.insert(rng.randint(0, len(given)), self._wrong_argument(given))
        return given

    def _wrong_argument(self, given: Sequence[str]) -> str:
        rng = self.rng
        if rng.random() < 0.15:
            return rng.choice(FLAGS)
        own = [x.partition("=")[0].lstrip("+") for x in given]
        key = rng.choice(own if own and rng.random() < 0.3 else self._keys)
        if rng.random() < 0.1:
            key = rng.choice(
                (key + ".x", key[:-1], key.upper(), f"{key}[0]", "hydra.run.dir", "engine@judge.engine", "assume.x")
            )
        return f"{rng.choice(('', '', '', '+', '++', '~'))}{key}={rng.choice(VALUES)}"

    def _damage_one(self) -> str:
        """Damage a file of the materials, and say how."""
        rng = self.rng
        named = " ".join([*RECIPES[self.recipe], *MORE.get(self.recipe, [])])
        used = [self.directory / name for name in re.findall(r"\{d\}/([\w.]+)", named)] + [self.directory / "eft.jsonl"]
        found = [p for top in used for p in (sorted(top.rglob("*")) if top.is_dir() else [top])]
        files = [p for p in found if p.is_file() and os.access(p, os.R_OK)]
        if len(files) < 2:
            return "nothing"
        path = rng.choice(files)
        kind = rng.choice(("json", "json", "json", "bytes", "cut", "empty", "gone", "directory", "other", "protected"))
        data = path.read_bytes()
        if kind == "json":
            path.write_bytes(damaged_json(data, rng))
        elif kind == "bytes":
            at = rng.randrange(len(data) + 1)
            path.write_bytes(data[:at] + rng.randbytes(rng.randint(0, 4)) + data[at + rng.randint(0, 4) :])
        elif kind in ("cut", "empty"):
            path.write_bytes(data[: rng.randrange(len(data) + 1)] if kind == "cut" else b"")
        elif kind in ("gone", "directory"):
            path.unlink()
            if kind == "directory":
                path.mkdir()
        elif kind == "other":
            shutil.copyfile(rng.choice([p for p in files if p != path]), path)
        else:
            path.chmod(0)
        return f"{kind}: {path.relative_to(self.directory)}"

    def run(self) -> tuple[str, str, str]:
        """How the call ended, where it went wrong, and what it printed."""
        printed = io.StringIO()
        before = os.getcwd(), sys.argv, dict(os.environ)
        sys.argv = [str(ROOT / "recipes" / f"{self.recipe}.py"), *self.arguments]
        os.chdir(self.directory)
        GlobalHydra.instance().clear()
        status: object = 0
        place = ""
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), time_limit(SECONDS_PER_CALL):
                runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as e:
            status = e.code or 0
        except BaseException as e:
            if isinstance(e, KeyboardInterrupt):
                raise
            status, place = "traceback", where(e)
            traceback.print_exc(file=printed)
        finally:
            os.chdir(before[0])
            sys.argv = before[1]
            os.environ.clear()
            os.environ.update(before[2])
        text = printed.getvalue()
        if status not in (0, 2, "traceback"):
            place = f"exit status {status!r}"
        elif status == 2 and "error: " not in text:
            place = "no message"
        elif status == 2 and "Traceback (most" in text:
            place = "a traceback in the output"
        return ("success" if status == 0 else "error" if status == 2 else "failure"), place, text


class Reached(SystemExit):
    """A call got to its first job."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"the call took more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def where(e: BaseException) -> str:
    """The kind of error, and the last line of this project that it went through."""
    frames = [
        f
        for f in traceback.extract_tb(e.__traceback__)
        if f.filename.startswith(str(ROOT)) and "/tools/" not in f.filename
    ]
    last = frames[-1] if frames else traceback.extract_tb(e.__traceback__)[-1]
    return f"{type(e).__name__} in {os.path.relpath(last.filename, ROOT)}:{last.lineno}"


def damaged_json(data: bytes, rng: random.Random) -> bytes:
    """A file of JSON or of lines of JSON with something else in the place of one of its values."""
    text = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    lines = [text]
    with contextlib.suppress(ValueError):
        json.loads(text)
        return json.dumps(replaced(json.loads(text), rng)).encode()
    lines = text.splitlines(keepends=True)
    if not lines:
        return b"null"
    at = rng.randrange(len(lines))
    with contextlib.suppress(ValueError):
        lines[at] = json.dumps(replaced(json.loads(lines[at]), rng)).encode() + b"\n"
    return b"".join(lines)


def replaced(value: Any, rng: random.Random) -> Any:
    """`value` with junk in the place of one of its parts."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: replaced(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        return [*value[:at], replaced(value[at], rng), *value[at + 1 :]]
    return rng.choice(JUNK)


def _reach(*args: object, **kwargs: object) -> None:
    raise Reached(0)


@contextlib.contextmanager
def without_jobs() -> Iterator[None]:
    """No call starts a job or a training."""
    kept: tuple[Callable[..., Any], ...] = LocalLauncher.run, machine.examine, cluster.examine
    LocalLauncher.run = _reach  # type: ignore[method-assign]
    machine.examine = lambda settings, directory: iter(())  # type: ignore[assignment]
    cluster.examine = _reach  # type: ignore[assignment]
    try:
        yield
    finally:
        LocalLauncher.run, machine.examine, cluster.examine = kept  # type: ignore[method-assign,assignment]


def fuzz(options: Options, base: Path) -> Outcomes:
    materials, keys = make_materials(base / "materials"), list(keys_of(asdict(Config(run_dir="r"))))
    outcomes, end = Outcomes(), time.monotonic() + 60 * options.minutes
    number = max(options.case, 0)
    with without_jobs():
        while time.monotonic() < end and (not options.num_cases or number < options.num_cases):
            case = Case(number, options.seed, materials, base / "case", keys)
            ended, place, text = case.run()
            report = f"case {number}, {case.recipe}: {ended} {place}\n{case.arguments}\n{case.damage}\n{text[-2500:]}\n"
            outcomes.num_cases += 1
            outcomes.by_recipe[case.recipe]["failure" if place else ended] += 1
            if place:
                known = outcomes.failures.setdefault(f"{case.recipe}: {place}", {"times": 0, "first": report})
                known["times"] += 1
                if known["times"] == 1:
                    print(f"FAILURE, {report}", flush=True)
            if options.case >= 0:
                print(report)
                break
            shutil.rmtree(base / "case")
            number += 1
    return outcomes


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        outcomes = fuzz(options, Path(name))
    result = {
        "options": asdict(options), "num_cases": outcomes.num_cases,
        "by_recipe": {name: dict(counts) for name, counts in sorted(outcomes.by_recipe.items())},
        "failures": outcomes.failures,
    }  # fmt: skip
    if options.output:
        write_atomic(Path(options.output), json.dumps(result, indent=2) + "\n")
    print(json.dumps({**result, "failures": {k: v["times"] for k, v in outcomes.failures.items()}}, indent=2))
    sys.exit(1 if outcomes.failures else 0)


if __name__ == "__main__":
    cli.run_program(Options, main)
