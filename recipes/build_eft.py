"""EFT seed from people's rankings, as in the paper (section 3.1.1). People write neither scores nor reasons.

    python recipes/build_eft.py run_dir=runs/eft data.ift_path=... data.rankings_path=...

First M0 is trained on the IFT seed alone. This model judges each ranked answer `refresh.num_judgements` times. Verdicts
are kept if their scores order the answers as people did (`stages/eft.py`). The result is `<run_dir>/eft.jsonl`; give it
to `iterate.py` as `data.eft_path`. All engines, launchers and recipes work, and a killed run continues at the next
start. A small model may be unable to judge. Then the program ends with an error that counts the verdicts and keeps
them, and you can use another judge (`judge.engine`).
"""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from nemo_srl import cli, preflight
from nemo_srl.artifacts import DATA
from nemo_srl.config import Config
from nemo_srl.errors import ConfigError
from nemo_srl.experiment import Experiment
from nemo_srl.records import IFTExample, RankedAnswers
from nemo_srl.stages import eft, sft

log = logging.getLogger(__name__)

cli.register_schemas(sys.argv[1:], schema=Config)


def check(cfg: Config, exp: Experiment) -> None:
    """Check all that the user gives before the first stage."""
    ift = exp.source(cfg.data.ift_path, IFTExample, key="data.ift_path")
    preflight.check(cfg, exp.base_model().model_dir, (), ift=ift.read())
    if cfg.data.rankings_path:
        eft.check(exp.source(cfg.data.rankings_path, RankedAnswers, key="data.rankings_path").read())


def build(cfg: Config, exp: Experiment) -> Path:
    """Run the two stages, and copy the result to `eft.jsonl`."""
    if not cfg.data.rankings_path:
        raise ConfigError("data.rankings_path='': give ranked answers, for example those that prepare_oasst.py writes")
    rankings = exp.source(cfg.data.rankings_path, RankedAnswers)
    m1 = exp.run(sft.STAGE, 0, policy=exp.base_model(), ift=exp.source(cfg.data.ift_path, IFTExample))
    verdicts = exp.run(eft.STAGE, 0, judge=m1, rankings=rankings)
    manifest = verdicts.manifest()
    assert manifest is not None
    figures = manifest.metrics
    log.info(
        "%.0f rankings, scores in %.1f%% of the verdicts, agreement in %.1f%%, %.0f examples kept (the paper: 1,630)",
        figures["num_rankings"],
        100 * figures["valid_rate"],
        100 * figures["agreement_rate"],
        figures["num_examples"],
    )
    path = exp.run_dir / "eft.jsonl"
    shutil.copyfile(verdicts.path / DATA, path)
    return path


def run(cfg: Config) -> None:
    with Experiment(cfg) as exp:
        check(cfg, exp)
        print(build(cfg, exp))


@hydra.main(version_base="1.3", config_path="../conf", config_name="iterate")
def main(cfg: DictConfig) -> None:
    cli.run_composed(cfg, Config, run)


if __name__ == "__main__":
    cli.start(main)
