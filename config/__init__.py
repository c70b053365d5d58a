"""Settings of a script: its globals, overridden by config files and --key=value, in order.

A config file is Python that assigns literals (`batch_size = 12`); it is parsed, never run. Two
names are special: `on_cuda = {...}` and `on_cpu = {...}` hold settings that apply only where the
script runs on a CUDA GPU, or anywhere else.
"""

import ast
import difflib
import re
import signal
import sys
import unicodedata
from pathlib import Path
from typing import Any, NoReturn

Settings = dict[str, Any]

# Settings that there were once, and what took their place.
ABLATION = "run it by experiments/ablations.py"
RETIRED = {
    "cross_first": f"{ABLATION} cross_first()",
    "n_cross_head": f"{ABLATION} n_cross_head(N)",
    "next_position": f"{ABLATION} next_position('add')",
    "router_detach": f"{ABLATION} router_detach()",
    "rounding": f"{ABLATION} rounding('sigmoid')",
    "rounding_scale": f"{ABLATION} rounding('sigmoid', SCALE)",
    "router_input=embedding": f"{ABLATION} embedding_router()",
    "encoder_loss": "the last commit that has it is fd66022",
    "encoder_loss_weight": "the last commit that has it is fd66022",
}


def settings_of(script_globals: Settings) -> Settings:
    """The settings of a script: its globals in lower case of type int, float, bool or str."""
    return {
        name: value
        for name, value in script_globals.items()
        if name.islower() and name[0] != "_" and isinstance(value, (int, float, bool, str))
    }


def override(script_globals: Settings, argv: list[str]) -> Settings:
    """The settings after the arguments: config files, --key=value, --key value, or --key alone for
    True, in order; the last one wins.

    A mistake, and --help, end the process: the mistake with one line and exit status 2.
    """
    defaults = settings_of(script_globals)
    if "--help" in argv or "-h" in argv:
        print_help(script_globals, defaults)
        sys.exit(0)
    items: list[tuple[str, Any, str]] = []  # key, value (a str where still to be read), where
    args = list(argv)
    while args:
        arg = args.pop(0)
        if not arg.startswith("--"):
            items += read_config_file(arg)
            continue
        key, equals, value = arg[2:].partition("=")
        if not equals:
            is_bool = type(defaults.get(key)) is bool
            if is_bool and not (args and args[0].lower() in ("true", "false")):
                value = "True"
            elif args and not args[0].startswith("--"):
                value = args.pop(0)
            else:
                require_known(key, defaults, arg)
                fail(f"--{key}: has no value; write --{key}=VALUE")
        items.append((key, parse(value, defaults.get(key)), f"--{key}={value}"))

    device = next((v for k, v, _ in reversed(items) if k == "device"), defaults.get("device"))
    on_cuda = "cuda" in str(pick_device(device) if device == "auto" else device)
    settings = dict(defaults)
    for key, value, where in items:
        of_device = key in ("on_cuda", "on_cpu")
        if of_device and not isinstance(value, dict):
            fail(f"{where}: {key}: takes a dict of settings, not {value!r}")
        for name, item in (value if of_device else {key: value}).items():
            item = check(name, item, defaults, where)
            if not of_device or (key == "on_cuda") == on_cuda:
                settings[name] = item
    return settings


def read_config_file(path: str) -> list[tuple[str, Any, str]]:
    """The assignments of a config file as (name, value, where)."""
    try:
        source = Path(path).read_text(encoding="utf-8")
        tree = ast.parse(source)
    except OSError as error:
        fail(f"{path}: cannot read this config file: {error.strerror} (settings are --key=value)")
    except (SyntaxError, ValueError) as error:  # ValueError: a NUL byte, or not UTF-8
        fail(f"{path}:{getattr(error, 'lineno', None) or 1}: not valid Python: {error}")
    except (MemoryError, RecursionError):
        fail(f"{path}: not a config file: an expression in it is nested too deeply")
    items = []
    for node in tree.body:
        where = f"{path}:{node.lineno}"
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if not (
            isinstance(node, ast.Assign)
            and len(node.targets) == 1
            and isinstance(node.targets[0], ast.Name)
        ):
            fail(f"{where}: a config file only assigns values to settings, as in: batch_size = 12")
        name = node.targets[0].id
        try:
            value = ast.literal_eval(node.value)
        except (ValueError, TypeError, MemoryError, RecursionError):
            written = ast.get_source_segment(source, node.value) or ""
            fail(f"{where}: {name}: takes a plain value, not {written[:200]!r}")
        items.append((name, value, where))
    return items


def parse(text: str, default: Any) -> Any:
    """A value from the command line: as it stands for a text setting, else as a Python literal."""
    if isinstance(default, str):
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


def require_known(name: Any, defaults: Settings, where: str) -> None:
    """Ends the process where there is no such setting, and names the nearest."""
    if name not in defaults:
        if name in RETIRED:
            fail(f"{where}: the setting {name!r} is gone: {RETIRED[name]}")
        near = difflib.get_close_matches(str(name), defaults, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        fail(f"{where}: there is no setting {name!r}{hint} (--help lists all)")


def check(name: Any, value: Any, defaults: Settings, where: str) -> Any:
    """The value, in the type that the setting `name` has; ends the process where it cannot be."""
    require_known(name, defaults, where)
    if f"{name}={value}" in RETIRED:
        fail(f"{where}: {name}={value!r} is gone: {RETIRED[f'{name}={value}']}")
    kind = type(defaults[name])
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        fail(f"{where}: {name} takes {kind.__name__} (such as {defaults[name]!r}), not {value!r}")
    return value


def print_help(script_globals: Settings, defaults: Settings) -> None:
    """Prints the script's docstring, and every setting as its source has it, comment included."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends like other programs
    print(script_globals["__doc__"].strip() + "\n\nSettings and their defaults:\n")
    names = set(defaults)
    for line in Path(script_globals["__file__"]).read_text(encoding="utf-8").splitlines():
        match = re.match(r"(\w+) = ", line)
        if match and match[1] in names:
            names.remove(match[1])  # its first assignment is the default
            print(f"  --{line.replace(' = ', '=', 1)}")


def pick_device(device: str) -> str:
    """The device to use: for `auto` CUDA, else MPS, else the CPU. Ends the process without it."""
    import torch  # here, since preparing text needs no torch

    if device == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        return "cuda" if torch.cuda.is_available() else mps
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(f"device={device!r}: {str(error).splitlines()[0]}")
    return device


def fail(message: str) -> NoReturn:
    """Ends the process with one line on stderr that names the script, and exit status 2."""
    line = printable(message).replace("\n", "\\n")
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    sys.exit(2)


def printable(text: str) -> str:
    """Text that cannot steer a terminal: controls but for line ends and tabs, and marks of
    direction and the like, are spelled out, as \\x1b."""
    steering = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(
        ascii(c)[1:-1] if unicodedata.category(c) in steering and c not in "\n\t" else c
        for c in text
    )
