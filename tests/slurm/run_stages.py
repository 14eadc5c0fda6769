"""All stages that ask a model, on M0 and without trainings: `python -m tests.slurm.run_stages OVERRIDE...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nemo_srl import cli
from nemo_srl.experiment import Experiment
from nemo_srl.stages import anchor, candidates, evaluation, judgements, pairs, prompts
from recipes import iterate
from tests.support import composed


def main(overrides: Sequence[str]) -> None:
    cli.log_to_stderr()
    cfg = composed(*overrides)
    with cli.one_line_errors(), Experiment(cfg) as exp:
        given = iterate.open_given(cfg, exp)
        m = given.m0
        exp.run(evaluation.STAGE, 0, policy=m, eft_eval=given.held_out)
        x = exp.run(prompts.STAGE, 1, policy=m, ift=given.ift, eft_eval=given.held_out, earlier=[])
        y = exp.run(candidates.STAGE, 1, policy=m, prompts=x)
        r = exp.run(judgements.STAGE, 1, judge=m, candidates=y)
        d = exp.run(pairs.STAGE, 1, candidates=y, judgements=r)
        exp.run(anchor.STAGE, 1, judge=m, candidates=y, judgements=r, pairs=d, small=True)


if __name__ == "__main__":
    main(sys.argv[1:])
