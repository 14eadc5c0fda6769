"""docs/extending.md is true: its code is the guest's, its commands work, and no kind needs more files than it says."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_srl import judging, pairing, registry
from nemo_srl.config import BACKENDS
from nemo_srl.models import families
from nemo_srl.trainers.nemo_aligner import losses
from tests.extending.guest import PACKAGE, Guest, program
from tests.support import RECIPE, ROOT, composed

PAGE = (ROOT / "docs" / "extending.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
NUMBERS = {
    "engine.BACKEND": 3, "trainer.BACKEND": 3, "launcher.BACKEND": 3, "family.FAMILY": 1, "reader.READER": 2,
    "rule.best_next": 2, "loss.hinge": 2, "stage.STAGE": 2,
}  # fmt: skip
"""How many files of the guest each of its things may take."""


def blocks(language: str) -> Iterator[str]:
    yield from re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_all_code_of_the_page_is_the_guests() -> None:
    for language, suffix in (("python", "*.py"), ("yaml", "*.yaml")):
        files = [path.read_text() for path in sorted(PACKAGE.rglob(suffix))]
        found = list(blocks(language))
        assert found
        for block in found:
            assert any(block in text for text in files), f"no file of the guest has this:\n{block}"


def test_every_kind_has_a_section_with_code_and_every_file_it_names_exists() -> None:
    rows = re.findall(r"^\| \[(.+?)\]\(#(.+?)\)", PAGE, re.MULTILINE)
    assert len(rows) == 9
    sections = {text.split("\n", 1)[0].lower().replace(" ", "-"): text for text in PAGE.split("\n## ")[1:]}
    for _, anchor in rows:
        assert "```python" in sections[anchor], anchor
    for path in re.findall(r"`((?:nemo_srl|tests|recipes|examples|conf)/[\w/.]+)`", PAGE):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_page_is_understood(command: str) -> None:
    _, recipe, *arguments = shlex.split(command)
    assert recipe in ("recipes/iterate.py", "recipes/plan.py")
    if arguments[0].startswith("--config-dir="):
        directory = ROOT / arguments.pop(0).partition("=")[2]
        arguments.append(f"hydra.searchpath=[file://{directory}]")
    name = next((a.removeprefix("recipe=") for a in arguments if a.startswith("recipe=")), "srl-smollm2-135m-checked")
    cfg = composed(*(a for a in arguments if not a.startswith("recipe=")), recipe=name)
    judging.reader(cfg.judge).check(cfg.judge)
    pairing.rule(cfg.pairs)
    losses.check(cfg.dpo)
    chosen = [cfg.engine, cfg.trainer, cfg.launcher, cfg.judge.engine, cfg.judge, cfg.pairs, cfg.dpo, cfg.model]
    assert "house_guest" in repr(chosen), "the command chooses nothing of the guest's"


def test_a_plan_knows_the_guests_family_engine_and_trainer(guest: Guest) -> None:
    done = program(
        "recipes/plan.py", f"recipe={RECIPE}", f"model.path={guest.model}", "model.family=house_guest.family",
        "trainer=house_guest.trainer", "engine=house_guest.engine", "engine.words=a b c",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "whole run" in done.stdout


def test_each_kind_takes_no_more_files_than_the_page_says() -> None:
    code = (
        "import importlib, json, sys\n"
        f"found = {{}}\nfor name in {list(NUMBERS)!r}:\n"
        "    for m in [m for m in sys.modules if m.startswith('house_guest')]: del sys.modules[m]\n"
        "    module, _, thing = name.partition('.')\n"
        "    getattr(importlib.import_module('house_guest.' + module), thing)\n"
        "    found[name] = sorted(m for m in sys.modules if m.startswith('house_guest.'))\n"
        "print(json.dumps(found))"
    )
    done = program("-c", code)
    found = json.loads(done.stdout)
    for name, most in NUMBERS.items():
        assert found[name] == [f"house_guest.{name.partition('.')[0]}"], "it imports no other part of the package"
        settings = list((PACKAGE / "conf" / name.partition(".")[0]).glob("*.yaml"))
        assert len(found[name]) + len(settings) <= most


@pytest.mark.parametrize("package", ["engines", "trainers", "launchers"])
def test_in_this_project_a_backend_is_a_folder_that_nothing_else_names(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = package.removesuffix("s")
    (tmp_path / "visitor").mkdir()
    (tmp_path / "visitor/__init__.py").write_text(f"from house_guest.{group} import BACKEND\n")
    module = __import__(f"nemo_srl.{package}", fromlist=["x"])
    monkeypatch.setattr(module, "__path__", [*module.__path__, str(tmp_path)])
    assert "visitor" in registry.names(package)
    assert (group, (package, BACKENDS[group][1])) in BACKENDS.items()
    (tmp_path / group).mkdir()
    (tmp_path / group / "visitor.yaml").write_text("defaults: [visitor_schema, _self_]\nname: visitor\n")
    words = ["engine.words=a b c"] if group == "engine" else []
    cfg = composed(f"{group}=visitor", *words, f"hydra.searchpath=[file://{tmp_path}]")
    assert getattr(cfg, group).name == "visitor"
    assert type(getattr(cfg, group)) is registry.load(package, "visitor").settings


def test_in_this_project_a_family_is_a_file_that_nothing_else_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "visiting_family.py").write_text("from house_guest.family import FAMILY\n")
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    assert families.known()["guest_llama"].embedding == "tokens.weight"
