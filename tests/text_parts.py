"""The text parts of a checkpoint, copied."""

import shutil


def copy_text_parts(checkpoint, target):
    """`target`, with the tokenizer and the text encoder of a checkpoint folder and nothing else."""
    for part in ("tokenizer", "text_encoder"):
        (target / part).mkdir(parents=True)
        for file in (checkpoint / part).iterdir():
            shutil.copyfile(file, target / part / file.name)
    (target / "model_index.json").write_text("{}")
    return target
