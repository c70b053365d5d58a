"""A script's settings: its globals, overridden by config files and --key=value, in order.

A config file assigns values, as in `gradient_accumulation_steps = 5 * 8`. It is parsed, never run.
Three names are special: `base = "other.py"` reads that file, which lies beside it, in place;
`on_cuda = {...}` and `on_cpu = {...}` hold settings for a CUDA GPU, and for all other devices.
Also what all scripts share: one-line errors, and text that cannot control a terminal.
"""

import ast
import builtins
import codecs
import os
import re
import sys
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from difflib import get_close_matches
from operator import add, floordiv, mul, sub, truediv
from pathlib import Path
from shlex import quote
from typing import Any, NoReturn

OPERATORS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv, ast.FloorDiv: floordiv}
UNDO = ExitStack()  # puts back what a script changed in its process, which may be a notebook's
DTYPES = ("auto", "bfloat16", "float16", "float32")
LARGEST = {int: 2**63, float: 1e38}  # near what an integer tensor, or float32, can hold
UNUSABLE = (ValueError, ArithmeticError, MemoryError, RecursionError)  # what `evaluate` raises
# Settings that are gone, and what replaced them.
ABLATED = "cross_first n_cross_head next_position router_detach rounding rounding_scale"
RETIRED = dict.fromkeys(ABLATED.split(), "run it by experiments/ablations.py")
RETIRED["router_input=embedding"] = "run it by experiments/ablations.py"
RETIRED |= dict.fromkeys(("encoder_loss", "encoder_loss_weight"), "commit fd66022 has it")
RETIRED["muon_learning_rate"] = "set muon_lr_ratio, Muon's rate over learning_rate"


class Settings(dict[str, Any]):
    """A script's settings by name, initially its lower-case globals of type int, float, bool or
    str. Its globals LEAST and ALLOWED, if there, limit the values; PATHS names those that are
    paths, in which ~ is the home folder."""

    def __init__(self, script_globals: Mapping[str, Any]):
        for name, value in script_globals.items():
            if name.islower() and name[0] != "_" and isinstance(value, (int, float, bool, str)):
                self[name] = value
        self.defaults = dict(self)
        self.least = script_globals.get("LEAST", {})
        self.allowed = script_globals.get("ALLOWED", {})
        self.paths = script_globals.get("PATHS", ())
        self.where: dict[str, str] = {}  # of what is not the default: "mine.py:3", "--n_layer=4"


def override(script_globals: Mapping[str, Any], argv: list[str]) -> Settings:
    """The settings after the arguments: config files, --key=value, --key value, or --key alone for
    True, in order; the last one wins. A mistake ends the process with one line."""
    UNDO.close()  # left by an earlier script that crashed
    if shell := getattr(builtins, "get_ipython", None):  # a notebook shows errors itself
        events = shell().events
        events.register("post_execute", UNDO.close)
        UNDO.callback(events.unregister, "post_execute", UNDO.close)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # None where it is closed
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what cannot be shown is replaced; lines come soon
            UNDO.callback(put_back, stream, stream.errors, stream.line_buffering)
            stream.reconfigure(errors="replace", line_buffering=True)
    settings = Settings(script_globals)
    if "--help" in argv or "-h" in argv:
        try:
            print_help(script_globals, settings)
        except OSError as error:
            fail(error)
        UNDO.close()
        sys.exit(0)
    given = [*read_arguments(argv, settings)]
    device = settings.get("device")
    for section, name, value, _ in sum(given, []):
        if name == "device" and not section:
            device = value.value if isinstance(value, ast.Constant) else value
    device = str(pick_device(device) if device == "auto" else device)
    elsewhere = "on_cpu" if "cuda" in device else "on_cuda"
    for assignments in given:
        names: dict[str, Any] = {}  # what this file has set before
        for section, name, value, where in assignments:
            if section == elsewhere:
                require_known(name, settings, where)
                continue
            if isinstance(value, ast.expr):
                try:
                    value = evaluate(value, names)
                except UNUSABLE as error:
                    fail(f"{where}: {name}: {error}")
            if name in ("on_cuda", "on_cpu"):
                fail(f"{where}: {name}: takes a dict of settings, not {value!r}")
            names[name] = settings[name] = check(name, value, settings, where)
            settings.where[name] = where
    return settings


def read_arguments(argv: list[str], settings: Settings) -> Iterator[list[tuple]]:
    """For each argument its assignments (section, name, value, where), section "" for none; what a
    config file assigns is an expression, not evaluated yet."""
    args = list(argv)
    while args:
        arg = args.pop(0)
        if not arg.startswith("--"):
            if not arg.endswith(".py"):
                said = "not a config file, which ends in .py (settings are --key=value)"
                fail(f"{arg}: {said}{meant(arg, settings)}")
            yield [*read_config_file(os.path.expanduser(arg))]
            continue
        key, equals, value = arg[2:].partition("=")
        if not equals:
            is_bool = type(settings.get(key)) is bool
            if is_bool and not (args and args[0].lower() in ("true", "false")):
                value = "True"
            elif args and not args[0].startswith("--"):
                value = args.pop(0)
            else:
                require_known(key, settings, arg)
                fail(f"--{key}: has no value; write --{key}=VALUE")
        yield [("", key, parse(value, settings.get(key)), f"--{key}={value}")]


def meant(arg: str, settings: Settings) -> str:
    """A hint for an argument that is neither a setting nor a config file."""
    trains, folder = "init_from" in settings, os.path.dirname(arg) if arg[-3:] == ".pt" else arg
    if os.path.exists(os.path.join(folder, "ckpt.pt" if trains else "")) and "out_dir" in settings:
        return "; a run is " + "--init_from=resume " * trains + f"--out_dir={quote(folder)}"
    texts = {"input_file": "", "start": "FILE:" * os.path.isfile(arg)}
    hints = [f"; a text is --{n}={quote(how + arg)}" for n, how in texts.items() if n in settings]
    prepare = f"; a text is prepared by prepare_shakespeare.py --input_file={quote(arg)}"
    return "".join(hints) or prepare * (trains and os.path.isfile(arg))


def read_config_file(path: str, users: tuple[Path, ...] = (), said: str = "") -> Iterator[tuple]:
    """The assignments of a config file, those of its base in place; `users` are the files that have
    it as their base, `said` is the place which says so."""
    try:
        tree = ast.parse(decode(Path(path).read_bytes()))
    except OSError as error:
        hint = "" if said else " (settings are --key=value)"
        fail(f"{said}{path}: cannot read this config file: {error.strerror}{hint}")
    except (SyntaxError, ValueError) as error:  # ValueError: a NUL byte, or not UTF-8
        fail(f"{path}:{getattr(error, 'lineno', None) or 1}: not valid Python: {error}")
    except (MemoryError, RecursionError):
        fail(f"{path}: not a config file: an expression in it is nested too deeply")
    for node in tree.body:
        where = f"{path}:{node.lineno}"
        match node:
            case ast.Expr(value=ast.Constant()):  # a docstring
                continue
            case ast.Assign(targets=[ast.Name(id="base")], value=ast.Constant(value=str(name))):
                base = Path(path).parent / os.path.expanduser(name)
                chain = (*users, Path(path).resolve())
                if base.resolve() in chain:
                    fail(f"{where}: base={name!r}: a file cannot be its own base")
                yield from read_config_file(str(base), chain, f"{where}: base={name!r}: ")
            case ast.Assign(targets=[ast.Name(id="base")]):
                fail(f"{where}: base: takes the name of a file beside this one, as text")
            case ast.Assign(
                targets=[ast.Name(id=("on_cuda" | "on_cpu") as name)], value=ast.Dict()
            ):
                for key, value in zip(node.value.keys, node.value.values, strict=True):
                    key = key.value if isinstance(key, ast.Constant) else ast.unparse(key or value)
                    yield name, key, value, f"{path}:{value.lineno}"
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                yield "", name, value, where
            case _:
                fail(f"{where}: a config file only assigns values to settings: batch_size = 12")


def evaluate(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """The value of an expression: a plain value, one of `names`, or + - * / // on numbers.
    Anything else is a ValueError with a line for the user."""

    def number(node: ast.expr) -> int | float:
        if type(value := evaluate(node, names)) in (int, float):
            return value
        raise ValueError(f"only numbers can be calculated with, not {value!r}")

    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.Name(id=name):
            raise ValueError(f"{name!r} is not set before this line, in this file or its base")
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as op, operand=operand):
            return -number(operand) if isinstance(op, ast.USub) else number(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](number(left), number(right))
    raise ValueError(f"takes a value, or numbers with + - * / //, not {ast.unparse(node)!r}")


def parse(text: str, default: Any) -> Any:
    """A value from the command line: as it stands for a text setting, else evaluated."""
    if isinstance(default, str):
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return evaluate(ast.parse(text.strip(), mode="eval").body, {})
    except (SyntaxError, *UNUSABLE):
        return text


def require_known(name: Any, settings: Settings, where: str) -> None:
    """Ends the process if there is no such setting; the message names the nearest."""
    if name not in settings:
        if name in RETIRED:
            fail(f"{where}: the setting {name!r} is gone: {RETIRED[name]}")
        near = get_close_matches(str(name), settings, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        fail(f"{where}: there is no setting {name!r}{hint} (--help lists all)")


def check(name: Any, value: Any, settings: Settings, where: str) -> Any:
    """The value, in the type of the setting `name`; ends the process if it does not fit."""
    require_known(name, settings, where)
    if f"{name}={value}" in RETIRED:
        fail(f"{where}: {name}={value!r} is gone: {RETIRED[f'{name}={value}']}")
    kind = type(settings[name])
    if kind is float and type(value) is int and abs(value) < 1e300:
        value = float(value)
    if type(value) is not kind:
        fail(f"{where}: {name} takes {kind.__name__} (such as {settings[name]!r}), not {value!r}")
    if name in settings.paths:
        value = os.path.expanduser(os.path.expandvars(value))
        if value.startswith("~"):
            fail(f"{where}: {name}: {value!r}: there is no such home folder")
    place = "" if where.startswith("--") else f"{where}: "
    if name in settings.least and not value >= settings.least[name]:  # NaN is not, either
        fail(f"{place}{name}={value}: must be at least {settings.least[name]}")
    if name in settings.allowed and value not in settings.allowed[name]:
        fail(f"{place}{name}={value!r}: must be one of {', '.join(settings.allowed[name])}")
    if kind in LARGEST and not abs(value) < LARGEST[kind]:
        fail(f"{place}{name}={value}: must be finite, and below {LARGEST[kind]:.3g}")
    return value


def print_help(script_globals: Mapping[str, Any], settings: Settings) -> None:
    """Prints the script's docstring, and every setting as its source has it, comment included."""
    print((script_globals["__doc__"] or "").strip() + "\n\nSettings and their defaults:\n")
    names = set(settings)
    for line in Path(script_globals["__file__"]).read_text(encoding="utf-8").splitlines():
        if (match := re.match(r"(\w+) = ", line)) and match[1] in names:
            names.remove(match[1])  # its first assignment is the default
            print(f"  --{line.replace(' = ', '=', 1)}")


def pick_device(device: str) -> str:
    """The device to use: for `auto` CUDA, else MPS, else the CPU. ValueError if it is missing."""
    import torch  # here, since preparing text needs no torch

    there, count = {"cpu": "cpu"}, torch.cuda.device_count()
    if torch.backends.mps.is_available():
        there = {"mps": "mps"} | there
    if count:
        there = {"cuda": "cuda:0" + f" to cuda:{count - 1}" * (count > 1)} | there
    if device == "auto":
        return next(iter(there))
    reason = "is not there"
    try:
        if device.partition(":")[0] in there:
            torch.zeros(1, device=device)
            return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
    has = ", ".join(there.values())
    raise ValueError(f"device={device!r:.20}: {reason:.40}; this machine has {has}")


def pick_dtype(dtype: str, device: str) -> str:
    """For `auto` bfloat16 on a CUDA GPU that has it, float16 on another one, else float32."""
    import torch

    if dtype != "auto" or not device.startswith("cuda"):
        return "float32" if dtype == "auto" else dtype
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def decode(raw: bytes) -> str:
    """A text as editors write it: in UTF-8, or in UTF-16 behind a byte-order mark; its line ends
    become \\n. UnicodeDecodeError for other bytes, and for NULs."""
    marked = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = raw.decode("utf-16" if marked else "utf-8-sig")
    if "\0" in text:
        at, reason = raw.index(b"\0"), "a NUL, as in UTF-16 without a mark"
        raise UnicodeDecodeError("utf-8", raw, at, at + 1, reason)
    return text.replace("\r\n", "\n")


def fail(reason: str | Exception, status: int = 2) -> NoReturn:
    """Ends the process with one line on stderr that names the script, and with this exit status;
    silently if the reader of its stdout, such as head, has gone."""
    if isinstance(reason, BrokenPipeError):
        status = 128 + 13  # SIGPIPE, which Windows lacks
    else:
        line = reason if isinstance(reason, str) else str(reason).partition("\n")[0]
        line = printable(line).replace("\n", "\\n")
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    UNDO.close()
    sys.exit(status)


def put_back(stream: Any, errors: str, line_buffering: bool) -> None:
    """Restores a stream's error handling and buffering."""
    try:
        stream.flush()
    except OSError:
        to_nowhere(stream)
    stream.reconfigure(errors=errors, line_buffering=line_buffering)


def to_nowhere(stream: Any) -> None:
    """Sends what a stream still holds, and all that follows, to /dev/null."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def printable(text: str) -> str:
    """Text that cannot control a terminal: control characters except line ends and tabs, and marks
    such as those of direction, are spelled out, as \\x1b."""
    kept, steering = "\n\t", ("Cc", "Cf", "Cs", "Zl", "Zp")
    spelled = {c: ascii(c)[1:-1] for c in set(text) if unicodedata.category(c) in steering}
    return "".join(c if c in kept else spelled.get(c, c) for c in text)


def lacks_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out, on any device."""
    return isinstance(error, MemoryError) or bool(re.search("(out of|allocate) memory", str(error)))
