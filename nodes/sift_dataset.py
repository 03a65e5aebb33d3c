"""A look through recordings before they train anything."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io, ui
from torch import Tensor

from ..cat_encoder import CatError
from ..cat_encoder.listening.sift import Rules, sift_folder
from ..mova.errors import InputError, MediaError
from ..mova.media_reading import read_audio
from . import host
from .listen import CatEncoder, EarSocket

PLACE = "cat_sift"  # the folder below ComfyUI's output directory
USUAL = Rules()


class CATSiftDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CATSiftDataset",
            display_name="CAT Dataset Sifter",
            category="MOVA/training",
            description="Listens to every recording of a folder and lists what to keep for training: it tags them and marks near-duplicates, outliers, "
            "silent, clipped, short and broken files. No recording is changed or deleted. It writes manifest.json, which training reads, and features.safetensors, "
            "so that only new files are listened to next time. Likeness is the encoder's opinion: look at the list before you trust it.",
            search_aliases=["cat", "dataset", "duplicates", "outliers", "clean dataset", "manifest", "training data"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                CatEncoder.Input("encoder", tooltip="From Load CAT Encoder. Tags and unwanted sounds need a head for tags, the rest does not."),
                io.String.Input(
                    "folder",
                    default="",
                    tooltip="A folder inside of ComfyUI's input directory, such as 'my_sounds'. Sub-folders count; films count by their sound.",
                ),
                io.Float.Input(
                    "duplicates",
                    default=USUAL.duplicate,
                    min=0.3,
                    max=1.0,
                    step=0.01,
                    round=0.001,
                    tooltip="Likeness from which two files count as one, 0.3 to 1; the longer one is kept. 1 = the same sound, 0 = as far apart as files of this folder usually are.",
                ),
                io.Float.Input(
                    "outliers",
                    default=USUAL.outlier,
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    round=0.01,
                    tooltip="How much farther than usual a file may lie from its nearest five, in spreads, 0 to 100. 0 = outliers are kept. Needs 8 files or more.",
                ),
                io.Float.Input(
                    "shortest", default=USUAL.shortest, min=0.0, max=60.0, step=0.1, round=0.01, tooltip="Files shorter than this are dropped, 0 to 60 seconds."
                ),
                io.Float.Input(
                    "listen_seconds",
                    default=30.0,
                    min=1.0,
                    max=600.0,
                    step=1.0,
                    round=0.1,
                    tooltip="How much of each file is listened to, from its start, 1 to 600 seconds.",
                ),
                io.String.Input("unwanted", default="", tooltip="Sounds whose files are dropped, as labels or everyday words: 'music, speech'. Empty = none."),
                io.Float.Input(
                    "strictness",
                    default=USUAL.strictness,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    advanced=True,
                    tooltip="How far an unwanted sound has to stand out to be heard, 0 to 1, as in CAT Prompt vs Sound Check.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="How many files are kept, and why each of the others is not."),
                io.String.Output(display_name="manifest", tooltip="JSON: every file with its tags, reasons, nearest neighbour and keep or drop."),
                io.String.Output(display_name="manifest_file", tooltip="Where manifest.json was written."),
                io.String.Output(display_name="features_file", tooltip="Where features.safetensors was written: a vector and scores for each file."),
            ],
        )

    @classmethod
    def validate_inputs(cls, folder: str | None = None) -> bool | str:
        try:
            return folder is None or bool(host.input_folder(folder))  # None: the name comes over a link
        except InputError as error:
            return str(error)

    @classmethod
    def fingerprint_inputs(cls, folder: str | None = None, **_: object) -> list[tuple[str, int, int]]:
        """The node runs again when a file of the folder changed; a name that comes over a link is not known yet."""
        files = [(path, path.stat()) for path in sorted(host.input_folder(folder).rglob("*")) if path.is_file()] if folder else []
        return [(str(path), about.st_size, about.st_mtime_ns) for path, about in files]

    @classmethod
    def execute(
        cls,
        encoder: EarSocket,
        folder: str,
        duplicates: float,
        outliers: float,
        shortest: float,
        listen_seconds: float,
        unwanted: str,
        strictness: float,
    ) -> io.NodeOutput:
        place = host.input_folder(folder)
        out = host.output_folder(PLACE, *place.relative_to(host.input_directory()).parts)
        rules = Rules(duplicates, outliers, shortest, listen_seconds, unwanted, strictness)
        with encoder.listening() as ear:
            sifting = sift_folder(ear, place, out, read_beginning, rules, host.ChunkProgress())
        host.show_text(cls.hidden.unique_id, str(sifting))
        manifest = sifting.manifest.read_text(encoding="utf-8")
        return io.NodeOutput(str(sifting), manifest, str(sifting.manifest), str(sifting.features), ui=ui.PreviewText(str(sifting)))


def read_beginning(path: Path, seconds: float) -> tuple[Tensor, int]:
    """The first seconds of a sound file or film: (waveform [C,S], rate)."""
    try:
        return read_audio(path, seconds)
    except MediaError as error:
        raise CatError(str(error)) from error
