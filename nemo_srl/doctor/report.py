"""The doctor's report: lines on the console, and `report.md` and `report.json`, which can be attached to an issue.

The values of environment variables and keys of servers are left out, because they may be secret.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_srl import jsonio
from nemo_srl.artifacts import write_atomic
from nemo_srl.doctor.findings import Finding
from nemo_srl.doctor.site import Site

SECTIONS = ("trainer", "engine", "launcher", "cluster")
HIDDEN = "(not shown)"
HIDING = {"env", "extra_body"}
"""Groups of settings whose values may be secret."""
SECRET = ("api_key", "token", "password")
"""How the names of single secret settings end."""


def line(finding: Finding) -> str:
    """What was tried, what was found, and what to set, for the console."""
    parts = [f"{finding.state:8} {finding.name:18} {finding.tried}", *_indented("found", finding.text)]
    return "\n".join([*parts, *(_indented("set", finding.remedy) if finding.remedy else [])])


def write(site: Site, arguments: Sequence[str], findings: Sequence[Finding]) -> Path:
    """Write both files, and return the path of the Markdown one. It is complete up to the last finding."""
    report = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "arguments": [_shown(argument) for argument in arguments],
        "model": site.cfg.model.path,
        "settings": settings(site),
        "findings": [{**asdict(x), "state": x.state} for x in findings],
        "nodes": site.facts,
    }
    write_atomic(site.directory / "report.json", jsonio.dumps(report, indent=1) + "\n")
    path = site.directory / "report.md"
    write_atomic(path, markdown(report, findings))
    return path


def settings(site: Site) -> dict[str, Any]:
    """The sections of the configuration that place work, without what may be secret."""
    return {name: _without_secrets(asdict(getattr(site.cfg, name))) for name in SECTIONS}


def markdown(report: dict[str, Any], findings: Sequence[Finding]) -> str:
    """The report as a text for people."""
    wrong = dict.fromkeys(x.name for x in findings if not x.ok)
    rows = [f"| {x.state} | {x.name} | {_cell(x.tried)} | {_cell(x.text)} | {_cell(x.remedy)} |" for x in findings]
    return "\n".join(
        [
            "# Doctor of nemo_srl",
            "",
            f"{report['date']}, `recipes/doctor.py {' '.join(report['arguments'])}`, model {report['model']}",
            "",
            f"Wrong: {', '.join(wrong)}" if wrong else "Nothing is wrong.",
            "",
            "| | check | tried | found | set |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "Settings, and what each node said:",
            "",
            "```json",
            jsonio.dumps({"settings": report["settings"], "nodes": report["nodes"]}, indent=1),
            "```",
            "",
        ]
    )


def _without_secrets(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        hides = key in HIDING
        return {k: HIDDEN if hides and not isinstance(v, dict) else _without_secrets(v, k) for k, v in value.items()}
    secret = key.endswith(SECRET) and isinstance(value, str) and value
    return HIDDEN if secret else value


def _shown(argument: str) -> str:
    """An argument of the program without a value that may be secret. Such a value may stand inside of braces, too."""
    key, _, _ = argument.partition("=")
    names = key.lstrip("+~").split(".")
    return f"{key}={HIDDEN}" if HIDING & set(names) or names[-1].endswith(SECRET) else argument


def _indented(title: str, text: str) -> list[str]:
    first, *rest = text.splitlines() or [""]
    return [f"{'':8} {title + ':':7} {first}", *(f"{'':16} {more}" for more in rest)]


def _cell(text: str) -> str:
    return "<br>".join(text.replace("|", "\\|").splitlines())
