"""Runs a workflow file without ComfyUI: `python -m headless run WORKFLOW.json --models DIR --input DIR --output DIR`."""

import sys


class WorkflowError(Exception):
    """A workflow, folder or command line that cannot be run; the message holds every problem found, one sentence a line."""


def say(text: str) -> None:
    """One line for the person watching. stdout carries only the paths of the files written."""
    print(text, file=sys.stderr, flush=True)
