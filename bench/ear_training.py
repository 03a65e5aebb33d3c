"""`python -m bench.ear_training`: how fast an encoder learns from unlabelled sounds, with and without representation regularization. Prints JSON, draws curves.

Everything is made here: six kinds of moving sounds (see ear_sounds), a tiny CAT, and a frozen outside encoder that never sees a label. Every few updates a
linear probe is fitted on the frozen encoder, on its class token (which is what is regularized, and what a classifier reads) and on the mean of its patch
tokens; chance is 1 in 6. Both runs of a seed share settings, weights at the start, clips, masks and their order.

Steps to a mark: the first probe at or above it. Marks lie a half, three quarters and the whole of the way from the untrained encoder to the best probe of the
run without regularization; the ratio is the steps without over the steps with. Probes are noisy by about 0.03 (300 clips).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from cat_encoder.config import cat_architecture
from cat_encoder.training.decoder import DecoderShape
from cat_encoder.training.masks import MaskPlan
from cat_encoder.training.objective import Weights
from cat_encoder.training.pretrain import PretrainSettings, open_pretraining
from cat_encoder.training.probe import READINGS, probe_accuracy
from cat_encoder.training.run import Run, RunSettings, Step, train
from cat_encoder.training.teacher import DecaySchedule

from .ear_sounds import FRAMES, KINDS, MovementEncoder, clips_of, labelled, read_made

ARCHITECTURE = cat_architecture(4, channels=(16,), width=32, depth=2, heads=4, position_rows=FRAMES // 16)
MARKS = {"half": 0.5, "three_quarters": 0.75, "whole": 1.0}
PROBE_TRAIN, PROBE_TEST = (10_000, 600), (20_004, 300)  # first sound and how many; training has 0 to 2999
PLOT, MARGIN = (900, 500), 60  # px
COLOURS = {"with": (200, 60, 40), "without": (50, 90, 170)}


def open_run(folder: Path, *, updates: int, seed: int, external: MovementEncoder | None, batch: int = 32, clips: int = 3000) -> Run:
    """A run of the tiny encoder; half the cells are hidden, and the errors of whole clips count less than in the recipe."""
    settings = PretrainSettings(
        frames=FRAMES, clones=1, mask=MaskPlan(0.5, 0.07, 2), decoder=DecoderShape(32, 2, 3, 8),
        weights=Weights(utterance=0.03, alignment=0.2), ema=DecaySchedule(0.99, 0.999, max(updates // 2, 1)),
    )  # fmt: skip
    run = RunSettings(updates=updates, warmup=updates // 20, rate=6e-3, batch=batch, seed=seed, save_every=10**9)
    return open_pretraining(
        clips_of(range(clips)), folder, architecture=ARCHITECTURE, settings=settings, run=run, external=external, read=read_made, keep=clips
    )


def learn(*, updates: int, seed: int, external: MovementEncoder | None, every: int, **sizes: int) -> dict[str, list]:
    """One run: curves of [update, value]: the probe's accuracy for each reading, from the untrained encoder on, and the loss but for the alignment error. sizes: batch and clips."""
    train_set, test_set = (labelled(range(first, first + count)) for first, count in (PROBE_TRAIN, PROBE_TEST))
    with tempfile.TemporaryDirectory() as folder:
        run = open_run(Path(folder), updates=updates, seed=seed, external=external, **sizes)
        encoder, curves = run.task.model.encoder, {name: [] for name in (*READINGS, "loss")}

        def probe(update: int) -> None:
            for reading, value in probe_accuracy(encoder, train_set, test_set).items():
                curves[reading].append([update, value])

        def on_step(step: Step) -> None:
            if step.update % every == 0:
                probe(step.update)
            if step.update % every == 0 or step.update == 1:
                curves["loss"].append([step.update, round(step.numbers["frame"] + step.numbers["utterance"], 4)])

        probe(0)
        train(run, on_step=on_step)
    return curves


def steps_to(curve: list[list[float]], mark: float) -> int | None:
    return next((update for update, value in curve if value >= mark), None)


def compare(without: list[list[float]], with_it: list[list[float]]) -> dict[str, dict[str, float | None]]:
    """Steps to each mark in both runs, and their ratio; None where the regularized run never got there."""
    start, best = without[0][1], max(value for _, value in without)
    found = {}
    for name, share in MARKS.items():
        mark = start + share * (best - start)
        steps = steps_to(without, mark), steps_to(with_it, mark)
        found[name] = {"accuracy": round(mark, 4), "without": steps[0], "with": steps[1], "ratio": round(steps[0] / steps[1], 2) if steps[1] else None}
    return found


def draw(runs: list[dict[str, dict[str, list]]], reading: str, file: Path) -> None:
    """Probe accuracy over updates, a thin line per seed and a thick one for the median of the seeds."""
    picture = Image.new("RGB", PLOT, "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(16)
    last = runs[0]["with"][reading][-1][0]

    def place(update: float, value: float) -> tuple[float, float]:
        return MARGIN + update / last * (PLOT[0] - 2 * MARGIN), PLOT[1] - MARGIN - value * (PLOT[1] - 2 * MARGIN)

    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        pen.line([place(0, value), place(last, value)], (225, 225, 225))
        pen.text((8, place(0, value)[1] - 9), f"{value:.2f}", "black", font)
    for share in range(5):
        pen.text((place(last * share / 4, 0)[0] - 15, PLOT[1] - MARGIN + 8), str(last * share // 4), "black", font)
    for row, (name, colour) in enumerate(COLOURS.items()):
        curves = [run[name][reading] for run in runs]
        pale = tuple((3 * 255 + channel) // 4 for channel in colour)
        for curve in curves:
            pen.line([place(*point) for point in curve], pale, 2)
        pen.line([place(points[0][0], statistics.median(value for _, value in points)) for points in zip(*curves, strict=True)], colour, 3)
        pen.text((PLOT[0] - 380, PLOT[1] - MARGIN - 60 + 22 * row), f"{name} representation regularization", colour, font)
    pen.text(
        (MARGIN, 20),
        f"Linear probe of the {reading.replace('_', ' ')}, {len(KINDS)} kinds of sounds, over updates; median of {len(runs)} seeds; chance {1 / len(KINDS):.2f}",
        "black",
        font,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file)


def main() -> None:
    from .step import describe_machine  # brings mova, which learning does not need

    parser = argparse.ArgumentParser(prog="python -m bench.ear_training", description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--every", type=int, default=25, help="updates between probes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path, default=Path("bench/results/local-ear-training.png"), help="the name of the reading is put in before .png")
    args = parser.parse_args()
    runs = []
    for seed in range(args.seeds):
        print(f"seed {seed} ...", file=sys.stderr)
        outside = {"with": MovementEncoder(), "without": None}
        runs.append({name: learn(updates=args.updates, seed=seed, external=each, every=args.every) for name, each in outside.items()})
    readings = {}
    for reading in READINGS:
        marks = [compare(run["without"][reading], run["with"][reading]) for run in runs]
        ratios = {name: [mark[name]["ratio"] for mark in marks] for name in MARKS}
        readings[reading] = {"ratio_of_steps": {name: {"median": middle(values), "seeds": values} for name, values in ratios.items()}, "marks": marks}
        draw(runs, reading, args.plot.with_name(f"{args.plot.stem}-{reading.replace('_', '-')}.png"))
    facts = {"machine": describe_machine(), "updates": args.updates, "probe_every": args.every}
    print(json.dumps(facts | {"readings": readings, "runs": runs}))


def middle(ratios: list[float | None]) -> float | None:
    """The median; a run that never got there counts as slower than any."""
    value = statistics.median(ratio or 0.0 for ratio in ratios)
    return value or None


if __name__ == "__main__":
    main()
