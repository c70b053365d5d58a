"""Files of a run: whole or not there, read without trust, and what a resumed run takes from them.

    model, tokenizer = load("out-shakespeare-char")            a trained model, to use
    model, saved = load_checkpoint("out-shakespeare-char/ckpt.pt")      all that was saved

A checkpoint is a file of torch.save: a zip archive, which holds a checksum of each of its parts.
What is in it is checked too: another program, or somebody, may have written it. When a run saves
is train.py's business.
"""

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import patch

import torch

from configurator import Settings, check, fail, lacks_memory, pick_device
from model import ModelConfig, ParallelEncoderDecoder
from prepare_shakespeare import Tokenizer

FORMAT = 2  # of a checkpoint; format 1 is of a model with other equations
ABLATIONS: list[str] = []  # of this process; experiments/ablations.py fills it
# What train.py saves beside the model, to go on from.
ENTRIES = dict(optimizers=list, scaler=dict, iter_num=int, seconds=float, best_val_loss=float)
ENTRIES |= dict(is_best=bool, tokenizer=dict, config=dict)
# A resumed run has the settings of its checkpoint, but for these, which are of each call.
OF_EACH_CALL = {"init_from", "out_dir", "eval_only", "device", "compile", "backend", "fsdp"}
OF_EACH_CALL |= {"wandb_log", "wandb_project", "wandb_run_name"}
MAY_CHANGE = {"dropout", "l1_norm", "entropy_weight", "l1_weight"}  # of the model's fields


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file aside with `write(file)`, has it on the disk, then renames it to `path`: at
    every moment a whole file is there, the old one or the new. OSError and RuntimeError where it
    cannot be written; then the old one is untouched."""
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


def save(path: Path, checkpoint: dict[str, Any], keep_best: bool) -> None:
    """Writes a checkpoint. With `keep_best` the one that is there is kept as ckpt_best.pt beside
    it; a checkpoint that is the best one takes its place. Errors as in `write_whole`."""
    best = path.with_name("ckpt_best.pt")
    if keep_best and path.exists():
        with open(path, "rb") as old:
            write_whole(best, partial(shutil.copyfileobj, old))
    write_whole(path, partial(torch.save, {"format": FORMAT, "ablations": ABLATIONS, **checkpoint}))
    if checkpoint["is_best"]:
        best.unlink(missing_ok=True)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Appends a row of JSON to a file, all of it or nothing. OSError where it cannot."""
    before = 0
    try:
        with open(path, "a", encoding="utf-8") as file:
            before = file.tell()
            file.write(json.dumps(row) + "\n")
    except OSError:
        with suppress(OSError):  # where not even the file could be made
            os.truncate(path, before)  # no half a line
        raise


def keep_earlier_run(folder: Path) -> None:
    """Renames the files of an earlier run to *.old, in place of those of the run before it."""
    for name in ("ckpt.pt", "ckpt_best.pt", "log.jsonl"):
        path, old = folder / name, folder / f"{name}.old"
        if path.exists():
            os.replace(path, old)
            print(f"{path}, of an earlier run, is now {old.name}")
            if name == "ckpt.pt":  # whose best one is not that of the run before
                (folder / "ckpt_best.pt.old").unlink(missing_ok=True)


def load(
    out_dir: str | Path, device: str = "auto", name: str = "ckpt.pt"
) -> tuple[ParallelEncoderDecoder, Tokenizer]:
    """The model that train.py left in `out_dir`, in evaluation, and its tokenizer; on the best
    device there is: CUDA, else MPS, else the CPU. ValueError as in `load_checkpoint`."""
    path = Path(out_dir, name)
    model, saved = load_checkpoint(path, pick_device(device))
    with told_in_one_line(path, "not a checkpoint of this model"):
        return model.eval(), Tokenizer(**saved["tokenizer"])


def load_checkpoint(path: str | Path, device: str = "cpu") -> tuple[ParallelEncoderDecoder, dict]:
    """The model that train.py saved at `path`, in training mode, and its other entries. Loads
    tensors and plain values only, never code. ValueError, with a line for the user, for a file that
    is missing, damaged, or not such a checkpoint."""
    checkpoint = read(path)
    return build_model(checkpoint, path).to(device), checkpoint


def read(path: str | Path) -> dict[str, Any]:
    """All that is in the checkpoint, on the CPU, checked; ValueError as in `load_checkpoint`."""
    with told_in_one_line(path, "not a whole checkpoint of train.py"):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
        if damaged is not None:
            raise ValueError(f"its part {damaged!r} is damaged: the checksum differs")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    with told_in_one_line(path, "not a checkpoint of this model"):
        if not isinstance(checkpoint, dict):
            raise TypeError(f"it holds a {type(checkpoint).__name__}")
        version = checkpoint.get("format", 1 if "tokenizer" in checkpoint else None)
        if version == 1:
            raise ValueError("it has format 1, which commit fd66022 reads")
        if version != FORMAT:
            raise ValueError(f"its format is {version!r}: must be {FORMAT}")
        if (saved := checkpoint.get("ablations", [])) != ABLATIONS:
            by = "run this by experiments/ablations.py"
            raise ValueError(f"its ablations are {saved}, here they are {ABLATIONS}: {by}")
        for name, kind in ENTRIES.items():
            value = checkpoint.get(name, kind())
            if type(value) is not kind or (kind in (int, float) and not value >= 0):
                raise ValueError(f"its {name} is {value!r:.100}")
        args = checkpoint["model_args"]
        if unknown := sorted(args.keys() - {field.name for field in fields(ModelConfig)}):
            raise ValueError(f"its model_args have an unknown {unknown[0]!r}")
        args = checkpoint["model_args"] = asdict(ModelConfig(**args))  # what it lacks: its default
        if "tokenizer" in checkpoint:
            size = Tokenizer(**checkpoint["tokenizer"]).vocab_size
            if size != args["vocab_size"]:
                raise ValueError(f"its tokenizer has {size} tokens, its model {args['vocab_size']}")
    return checkpoint


def build_model(saved: dict, path: str | Path, **changed: Any) -> ParallelEncoderDecoder:
    """The model of a checkpoint, whose weights it takes out; `changed` are fields of its config."""
    with told_in_one_line(path, "not a checkpoint of this model"):
        config, weights = ModelConfig(**saved["model_args"] | changed), saved.pop("model")
        if config.n_layer > len(weights):
            raise ValueError(f"n_layer={config.n_layer}: it has not as many weights")
        # Wrong sizes take no memory on this device, on which normal_ would import torch._dynamo.
        with torch.device("meta"), patch("torch.nn.init.normal_"):
            model = ParallelEncoderDecoder(config)
        model.load_state_dict(weights, assign=True)
    return model


@contextmanager
def told_in_one_line(path: str | Path, what: str) -> Iterator[None]:
    """What fails inside becomes a ValueError with a line for the user."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        said = "there is no checkpoint; train.py writes one, and --out_dir names its folder"
        raise ValueError(f"{path}: {said}") from None
    except Exception as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        reason = (reason.partition(":\n\t")[2] or reason).partition("\n")[0]  # one, of many weights
        if isinstance(error, PermissionError) or lacks_memory(error):
            what = "cannot be loaded"
        raise ValueError(f"{path}: {what}: {reason or type(error).__name__}") from None


def resume(path: Path, settings: Settings) -> dict[str, Any]:
    """The checkpoint of a run to go on with. Makes the settings those of the run, but --key=value
    and OF_EACH_CALL. Ends the process with one line where the run cannot go on."""
    try:
        saved = read(path)
    except ValueError as error:
        fail(str(error))
    for name in ENTRIES.keys() - saved.keys():
        fail(f"{path}: has no entry {name!r}; it was not written by this train.py")
    of_run, kept = settings.defaults | saved["config"] | saved["model_args"], []
    fixed = saved["model_args"].keys() - MAY_CHANGE | {"optimizer"}
    for name in sorted(of_run.keys() - OF_EACH_CALL - {"vocab_size"}, key=str):
        value = check(name, of_run[name], settings, str(path))
        where, differs = settings.where.get(name, ""), settings[name] != value
        if where.startswith("--") and differs and name in fixed:
            why = "sizes, architecture and optimizer of a run cannot change"
            fail(f"{where}: {path} has {name}={value!r}; {why}")
        if not where.startswith("--"):
            settings[name] = value
            if where and differs:
                kept.append(f"{name}={value!r}")
    if kept:
        print(f"the run keeps {', '.join(kept)}, not a config file's; change it by --key=value")
    if (new := settings["max_iters"]) != (old := of_run["max_iters"]):
        print(f"max_iters={new}, not {old}: where lr_decay_iters, penalty_iters are 0, they follow")
    print(f"goes on from {path}, saved after {saved['iter_num']} of {new} iterations")
    return saved
