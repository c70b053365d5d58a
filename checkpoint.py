"""Files of a run: whole or not there, read without trust, and what a resumed run takes from them.

    model, tokenizer = load("out-shakespeare-char")            a trained model, to use
    model, saved = load_checkpoint("out-shakespeare-char/ckpt.pt")      all that was saved

A checkpoint is a file of torch.save: a zip archive, which holds a checksum of each of its parts.
Its contents are checked, too: another program may have written it. train.py decides when to save.
"""

import math
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.overrides import TorchFunctionMode

from configurator import Settings, check, fail, lacks_memory, pick_device
from model import ModelConfig, ParallelEncoderDecoder
from prepare_shakespeare import Tokenizer

FORMAT = 2  # of a checkpoint; format 1 is of a model with other equations
ABLATIONS: list[str] = []  # of this process; experiments/ablations.py fills it
# What train.py saves beside the model, to go on from.
ENTRIES = dict(optimizers=list, scaler=dict, iter_num=int, seconds=float, best_val_loss=float)
ENTRIES |= dict(is_best=bool, tokenizer=dict, config=dict)
NEW = dict(iter_num=0, seconds=0.0, best_val_loss=math.inf, is_best=False)  # where a run begins
# A resumed run takes its settings from the checkpoint, except these, which are each call's.
OF_EACH_CALL = {"init_from", "out_dir", "eval_only", "device", "compile", "backend", "fsdp"}
OF_EACH_CALL |= {"wandb_log", "wandb_project", "wandb_run_name"}
MAY_CHANGE = {"dropout", "l1_norm", "entropy_weight", "l1_weight"}  # of the model's fields


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a temporary file with `write(file)`, syncs it to disk, then renames it to `path`: a
    whole file is there at every moment, the old one or the new. OSError or RuntimeError if it
    cannot be written; the old file is then untouched."""
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
    with suppress(OSError):  # the new name needs its folder synced; some systems cannot
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


def load(
    out_dir: str | Path, device: str = "auto", name: str = "ckpt.pt"
) -> tuple[ParallelEncoderDecoder, Tokenizer]:
    """The model that train.py left in `out_dir`, in evaluation, and its tokenizer; on the best
    device there is: CUDA, else MPS, else the CPU. ValueError as in `load_checkpoint`."""
    path = Path(out_dir, name).expanduser()
    model, saved = load_checkpoint(path, pick_device(device))
    with told_in_one_line(path, "not a checkpoint of this model"):
        return model.eval(), Tokenizer(**saved["tokenizer"])


def load_checkpoint(path: str | Path, device: str = "cpu") -> tuple[ParallelEncoderDecoder, dict]:
    """The model that train.py saved at `path`, in training mode, and its other entries. Loads
    tensors and plain values only, never code. ValueError, with a line for the user, for a file that
    is missing, damaged, or not such a checkpoint."""
    checkpoint = read(path)
    return build_model(checkpoint, path).to(device), checkpoint


def load_best(
    path: Path, is_best: bool, take_back: bool = False
) -> tuple[ParallelEncoderDecoder, dict]:
    """As `load_checkpoint`, of the best model of a run whose last one, at `path`, is_best or not;
    with `take_back` it takes that one's place."""
    older = path.with_name("ckpt_best.pt")  # beside a best one it is left from a kill
    if not is_best and older.exists():
        try:
            best = load_checkpoint(older)
            if take_back:
                os.replace(older, path)
            return best
        except ValueError as error:
            print(f"{error}; takes the last one in place of the best")
    return load_checkpoint(path)


def read(path: str | Path) -> dict[str, Any]:
    """The checkpoint's contents, checked, on the CPU; ValueError as in `load_checkpoint`."""
    path = os.path.expanduser(path)
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
        if version != FORMAT:
            said = {"None": "it lacks the format entry that train.py writes"}
            said |= {"1": "it has format 1, which commit fd66022 reads"}
            raise ValueError(said.get(str(version), f"its format is {version!r}: must be {FORMAT}"))
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
        config = ModelConfig(**saved["model_args"] | changed)
        # torch.compile, DDP and other wrappers put a prefix before each name.
        weights, first = saved.pop("model"), "tok_emb.weight"
        prefix = next((k.removesuffix(first) for k in weights if k.endswith(first)), "")
        weights = {name.removeprefix(prefix): weight for name, weight in weights.items()}
        weights = {k: w.float() if torch.is_tensor(w) else w for k, w in weights.items()}
        if "pos_emb.weight" in weights:
            weights["pos_emb.weight"] = weights["pos_emb.weight"][: config.block_size].clone()
        if config.n_layer > len(weights):
            raise ValueError(f"n_layer={config.n_layer}: it has not as many weights")
        # Wrong sizes take no memory on this device, on which normal_ would import torch._dynamo.
        with torch.device("meta"), WithoutNormal():
            model = ParallelEncoderDecoder(config)
        model.load_state_dict(weights, assign=True)
    return model


class WithoutNormal(TorchFunctionMode):
    """Inside, in this thread, torch.nn.init.normal_ does nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return None if func is torch.nn.init.normal_ else func(*args, **kwargs or {})


@contextmanager
def told_in_one_line(path: str | Path, what: str) -> Iterator[None]:
    """Turns any error inside into a ValueError with one line for the user."""
    try:
        yield
    except Exception as error:
        if not os.path.exists(at := os.path.expanduser(path)):
            said = "there is no checkpoint; train.py writes one, and --out_dir names its folder"
            old = f"; {at}.old is of an earlier run" * os.path.exists(f"{at}.old")
            raise ValueError(f"{path}: {said}{old}") from None
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        if reason.startswith("Weights only load failed"):
            what, reason = "not a checkpoint of train.py", "it holds more than tensors and values"
        reason = (reason.partition(":\n\t")[2] or reason).partition("\n")[0]  # one, of many weights
        if isinstance(error, PermissionError) or lacks_memory(error):
            what = "cannot be loaded"
        raise ValueError(f"{path}: {what}: {reason or type(error).__name__:.200}") from None


def start_from(path: Path, settings: Settings) -> tuple[dict[str, Any] | None, Path | None]:
    """The checkpoint that init_from names, and its path: the run at `path`, to resume, or another
    one, whose weights a new run starts from. Takes the settings from it, except OF_EACH_CALL and
    --key=value; a new run also keeps what a config file sets, except sizes. Ends the process with
    one line if that is impossible; ValueError as in `load_checkpoint`."""
    if settings["init_from"] == "scratch":
        return None, None
    new, source = settings["init_from"] != "resume", path
    if new:
        source = Path(settings["init_from"])
        source = source / "ckpt.pt" if os.path.isdir(source) else source
        if not os.path.exists(source):
            fail(f"init_from={str(source)!r}: must be scratch, resume, or the path of a run")
        folders = (source.resolve().parent, source.parent.resolve())
        if path.parent.resolve() in folders and not settings["eval_only"]:
            fail(f"out_dir={settings['out_dir']!r}: a new run from {source} needs another folder")
    saved = read(source)
    for name in ({"tokenizer"} if new else ENTRIES.keys()) - saved.keys():
        fail(f"{source}: has no entry {name!r}; it was not written by this train.py")
    args, kept = saved["model_args"], []
    of_run = settings.defaults | saved.setdefault("config", {}) | args
    if settings.where.get("max_iters", "").startswith("--"):
        of_run["max_seconds"] = 0.0  # the length is what this call says
    fixed = {*args, "optimizer"} - MAY_CHANGE - ({"block_size", "optimizer"} if new else set())
    for name in sorted(of_run.keys() - OF_EACH_CALL - {"vocab_size"}, key=str):
        value = check(name, of_run[name], settings, str(source))
        where, differs = settings.where.get(name, ""), settings[name] != value
        if where.startswith("--") and differs and name in fixed:
            fail(f"{where}: {source} has {name}={value!r}, which cannot change")
        if not where.startswith("--") and not (new and where and name not in fixed):
            settings[name] = value
            if where and differs:
                kept.append(f"{name}={value!r}")
    if args["position_embedding"] == "learned" and settings["block_size"] > args["block_size"]:
        said = f"{source} has learned positions for {args['block_size']} tokens, no more"
        fail(f"{settings.where.get('block_size', 'block_size')}: {said}")
    if settings["block_size"] != args["block_size"]:
        print(f"block_size={settings['block_size']}, not {args['block_size']} as in {source}")
    if kept:
        how = "" if new else "; change it by --key=value"
        print(f"the run keeps {', '.join(kept)}, not a config file's{how}")
    if not new and (now := settings["max_iters"]) != (old := of_run["max_iters"]):
        print(f"max_iters={now}, not {old}: where lr_decay_iters, penalty_iters are 0, they follow")
    begins = "a new run from the weights of" if new else "goes on from"
    print(f"{begins} {source}, saved after {saved.get('iter_num', 0)} iterations")
    return saved, source
