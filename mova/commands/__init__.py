"""The commands of `python -m mova`, one file each. Each imports what it needs when it runs, so that --help and small commands start at once."""

from . import check, check_sync, convert_lora, demo_model, enhance, generate, inspect, quantize

COMMANDS = (generate, inspect, check, quantize, check_sync, enhance, convert_lora, demo_model)  # in the order of --help; each has add(commands)
