"""EFT seed from people's rankings, as in the paper (section 3.1.1): no one writes a score or a reason.

    python recipes/build_eft.py run_dir=runs/eft data.ift_path=... data.rankings_path=...

M0 is trained on the IFT seed alone; that model judges the ranked answers, `refresh.num_judgements` times each, and its
verdicts are kept where their scores order the answers as people did (`stages/eft.py`). The result,
`<run_dir>/eft.jsonl`, is what `data.eft_path` of `iterate.py` reads. It can be killed and started again like any run,
and takes the same engines, launchers and recipes; `judge.engine` lets another judge do it, as it must where the trained
model is too small to judge: then this ends with an error that counts the verdicts, and keeps them.
"""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from nemo_srl import cli
from nemo_srl.artifacts import DATA
from nemo_srl.config import Config
from nemo_srl.errors import ConfigError
from nemo_srl.experiment import Experiment
from nemo_srl.records import IFTExample, RankedAnswers
from nemo_srl.stages import eft, sft

log = logging.getLogger(__name__)

cli.register_schemas(sys.argv[1:], schema=Config)


def build(cfg: Config, exp: Experiment) -> Path:
    """The two stages, and a copy of the result under a name of its own."""
    if not cfg.data.rankings_path:
        raise ConfigError("data.rankings_path='': give answers that people ranked, such as prepare_oasst.py writes")
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
        print(build(cfg, exp))


@hydra.main(version_base="1.3", config_path="../conf", config_name="iterate")
def main(cfg: DictConfig) -> None:
    cli.run_composed(cfg, Config, run)


if __name__ == "__main__":
    main()
