"""The command line. Exit codes: 0 every output node ran, 1 a node failed, 2 nothing was run, 130 stopped by Ctrl-C."""

import argparse
import logging
import sys
from pathlib import Path

from . import WorkflowError, say

PACK = Path(__file__).resolve().parent.parent  # the folder that ComfyUI would find in custom_nodes


def main(arguments: list[str] | None = None, pack: Path = PACK) -> int:
    parser = argparse.ArgumentParser(prog="python -m headless", description="Runs a workflow of this node pack without ComfyUI.")
    parser.add_argument("command", choices=["run"])
    parser.add_argument("workflow", type=Path, metavar="WORKFLOW.json", help="saved from ComfyUI, as canvas or API JSON")
    parser.add_argument("--models", type=Path, required=True, metavar="DIR", help="has ComfyUI's sub-folders: mova/<name>/, loras/, ...")
    parser.add_argument("--input", type=Path, required=True, metavar="DIR", help="where Load Image and Load Audio look")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where files are written; made when it is not there")
    parser.add_argument("--model", metavar="NAME", help="the folder in models/mova that every MOVA loader takes")
    parser.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="NODE: id, title or type (all that match); may be repeated")
    given = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("mova").setLevel(logging.INFO)
    try:
        from .runner import run  # after the arguments are read: torch takes seconds to import

        return run(given.workflow, models=given.models, inputs=given.input, outputs=given.output, model=given.model, assignments=given.set, pack=pack)
    except WorkflowError as error:
        say(str(error))
        return 2
    except KeyboardInterrupt:
        say("Stopped.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
