"""Shows whether a machine or a cluster works, before a run needs it. `recipes/doctor.py` prints the findings.

    findings.py   a line of the report, and the rule that one bad check ends no other
    tiny.py       the tiny models, what they are taught, and the stored losses
    machine.py    one machine: a tiny SFT, DPO and generation in this environment

    cluster.py    a cluster: the list of checks, which run small jobs through the recipe's own launcher and containers
    site.py       the recipe, its cluster, and how a check runs a job there
    probe.py      what runs on each node of a job: it collects facts and judges nothing
    versions.py memory.py storage.py ports.py     a probe, and the judgement of what it found
    training.py stopping.py                       trainings over several nodes; a stop request and its save
    serving.py sampling.py                        a server on a tiny model, whose distribution is known
    images.py                                     the recorded contract, and tests inside the container
    report.py                                     the report as text, Markdown and JSON

A probe runs in a container that may lack packages. So this file imports nothing, and `probe.py` only what Python has.
"""
