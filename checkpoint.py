"""Checkpoints that are whole or not there, and that are read without trust.

    write_whole(Path("out/ckpt.pt"), partial(torch.save, {"model": ..., "model_args": ...}))
    model, saved = load_checkpoint("out/ckpt.pt")

A checkpoint is a file of torch.save: a zip archive, which holds a checksum of each of its parts.
What is in it is checked too: another program, or somebody, may have written it.
"""

import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import BinaryIO

import torch

from model import ModelConfig, ParallelEncoderDecoder

FORMAT = 2  # of a checkpoint; format 1 is of a model with other equations
LAST_COMMIT_OF_FORMAT_1 = "fd66022"

ABLATIONS: list[str] = []  # of this process; experiments/ablations.py fills it

# What train.py saves beside the model, to go on from.
ENTRIES = {
    "optimizers": list,
    "iter_num": int,
    "seconds": float,
    "best_val_loss": float,
    "is_best": bool,
    "tokenizer": dict,
    "config": dict,
}


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file aside with `write(file)`, has it on the disk, then renames it to `path`.

    So at every moment a whole file is there: the old one, or the new. OSError and RuntimeError
    where it cannot be written; then the old one is untouched.
    """
    aside = path.with_name(f"{path.name}.tmp")
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # the new name is on the disk once its folder is; some have no such way
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load_checkpoint(path: str | Path, device: str = "cpu") -> tuple[ParallelEncoderDecoder, dict]:
    """The model that train.py saved at `path`, in training mode, and its other entries.

    Loads tensors and plain values only, never code. Raises ValueError, with a line for the user,
    for a file that is missing, damaged, or not such a checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
        if damaged is not None:
            raise ValueError(f"its part {damaged!r} is damaged: the checksum differs")
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except (FileNotFoundError, NotADirectoryError):
        said = "there is no checkpoint; train.py writes one, and --out_dir names its folder"
        raise ValueError(f"{path}: {said}") from None
    except Exception as error:  # a damaged file can fail anywhere inside a reader
        reason = str(error).partition("\n")[0] or type(error).__name__
        cannot = isinstance(error, PermissionError) or lacks_memory(error)
        what = "cannot be loaded" if cannot else "not a whole checkpoint of train.py"
        raise ValueError(f"{path}: {what}: {reason}") from None
    try:
        if not isinstance(checkpoint, dict):
            raise TypeError(f"it holds a {type(checkpoint).__name__}")
        version = checkpoint.get("format", 1 if "tokenizer" in checkpoint else None)
        if version == 1:
            raise ValueError(f"it has format 1, which commit {LAST_COMMIT_OF_FORMAT_1} reads")
        if version != FORMAT:
            raise ValueError(f"its format is {version!r}: must be {FORMAT}")
        if (saved := checkpoint.get("ablations", [])) != ABLATIONS:
            raise ValueError(
                f"its ablations are {saved}, here they are {ABLATIONS}: run this by "
                "experiments/ablations.py"
            )
        for name, kind in ENTRIES.items():
            value = checkpoint.get(name, kind())
            if type(value) is not kind or (kind in (int, float) and not value >= 0):
                raise ValueError(f"its {name} is {value!r:.100}")
        args, weights = checkpoint["model_args"], checkpoint.pop("model")
        if unknown := sorted(args.keys() - {field.name for field in fields(ModelConfig)}):
            raise ValueError(f"its model_args have an unknown {unknown[0]!r}")
        config = ModelConfig(**args)
        if config.n_layer > len(weights):
            raise ValueError(f"n_layer={config.n_layer}: it has not as many weights")
        with torch.device("meta"):  # so that wrong sizes are told before they take any memory
            ParallelEncoderDecoder(config).load_state_dict(weights, assign=True)
        model = ParallelEncoderDecoder(config)
        model.load_state_dict(weights)
    except (TypeError, KeyError, AttributeError, OverflowError, RuntimeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        reason = (reason.partition(":\n\t")[2] or reason).partition("\n")[0]  # one, of many weights
        what = "cannot be loaded" if lacks_memory(error) else "not a checkpoint of this model"
        raise ValueError(f"{path}: {what}: {reason}") from None
    return model.to(device), checkpoint


def lacks_memory(error: Exception) -> bool:
    """Whether it says that there is not enough memory, of whatever device."""
    said = str(error)
    return isinstance(error, MemoryError) or "out of memory" in said or "allocate memory" in said
