"""A recipe: answers, verdicts and second opinions on one model. `python -m house_guest.recipe settings.yaml`"""

from __future__ import annotations

import sys

from house_guest import stage
from omegaconf import DictConfig, OmegaConf

from nemo_srl import cli
from nemo_srl.artifacts import Table
from nemo_srl.config import Config, load
from nemo_srl.experiment import Experiment
from nemo_srl.records import Prompt
from nemo_srl.stages import candidates, judgements


def ask_twice(exp: Experiment) -> Table[stage.SecondOpinion]:
    m = exp.base_model()
    x = exp.source(exp.cfg.prompts.path, Prompt)
    y = exp.run(candidates.STAGE, 1, policy=m, prompts=x)
    r = exp.run(judgements.STAGE, 1, judge=m, candidates=y)
    return exp.run(stage.STAGE, 1, judge=m, candidates=y, judgements=r)


def main(path: str) -> None:
    cli.log_to_stderr()
    with cli.one_line_errors():
        settings = OmegaConf.load(path)
        assert isinstance(settings, DictConfig)
        with Experiment(load(settings, Config)) as exp:
            for x in ask_twice(exp).read():
                print(f"{x.key}  {x.first}  {x.second}")


if __name__ == "__main__":
    main(sys.argv[1])
