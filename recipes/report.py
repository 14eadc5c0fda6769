"""Write the `report.html` of a run: `python recipes/report.py run_dir=runs/srl-smollm2-135m-checked`.

The run need not be finished: the report shows its published stages. `recipes/iterate.py` writes the same file at the
end of a run. No other file is changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from nemo_srl import cli, report
from nemo_srl.runs import open_run


@dataclass
class Options:
    run_dir: str = MISSING


def main(options: Options) -> None:
    path = report.write_report(open_run(Path(options.run_dir)))
    print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    cli.run_program(Options, main)
