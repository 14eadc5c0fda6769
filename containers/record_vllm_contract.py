"""Record the names of vLLM that this package uses: run it with the Python of vLLM's environment or container.

    build/vllm/bin/python containers/record_vllm_contract.py > tests/contracts/vllm-<version>.json

Then let `CONTRACT` in tests/test_engine_vllm.py name the new file. The tests tell which of the names that we use the
new version does not know. No GPU is needed. If something has moved, this fails with an ImportError that names it.
Follow it here and in nemo_srl/engines/vllm/.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any


def flags(parser: argparse.ArgumentParser) -> list[str]:
    return sorted({flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")})


def record() -> dict[str, Any]:
    import vllm
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.openai.completion import protocol
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return {
        "version": vllm.__version__,
        "recorded": "by containers/record_vllm_contract.py, from the installed package",
        "serve_flags": flags(make_arg_parser(FlexibleArgumentParser())),
        "completion_request": sorted(protocol.CompletionRequest.model_fields),
        "completion_choice": sorted(protocol.CompletionResponseChoice.model_fields),
        "completion_logprobs": sorted(protocol.CompletionLogProbs.model_fields),
    }


if __name__ == "__main__":
    found = record()  # vLLM prints to standard output while it is imported
    json.dump(found, sys.stdout, indent=1)
    print()
