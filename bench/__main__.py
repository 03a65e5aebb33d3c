"""`make bench`: every CPU benchmark, printed as one JSON object. About ten minutes and 8 GB of temporary disk on two cores."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys

from .step import describe_machine

RUNS = {
    "ledger": ("bench.ledger",),
    "overlap": ("bench.overlap",),
    "memory": ("bench.memory",),
    "step_float32": ("bench.step", "--dtype", "float32"),
    "step_bfloat16": ("bench.step", "--dtype", "bfloat16"),
    "lora": ("bench.lora", "--dtype", "bfloat16", "--repeats", "3"),
    "syncnet": ("bench.syncnet",),
    "lipsync": ("bench.lipsync",),
    "ear": ("bench.ear",),
}


def main() -> None:
    results: dict[str, object] = {"date": datetime.date.today().isoformat(), "machine": describe_machine()}
    for name, (module, *words) in RUNS.items():
        print(f"{name} ...", file=sys.stderr)
        done = subprocess.run([sys.executable, "-m", module, *words], check=True, stdout=subprocess.PIPE, text=True)
        results[name] = json.loads(done.stdout)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
