"""Samples text from a checkpoint of train.py; of its folder only ckpt.pt is needed.

    python sample.py --out_dir=out-shakespeare-char
    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=1
    python sample.py --out_dir=out-shakespeare-char --start=FILE:prompt.txt --temperature=0
    python sample.py --out_dir=out-shakespeare-char --interactive
    python sample.py --out_dir=out-shakespeare-char --show_experts --html=experts.html
    python sample.py --out_dir=out-shakespeare-char --read=FILE:mine.txt --html=mine.html

From Python, use checkpoint.load and model.generate instead.
"""

import codecs
import os
import sys
from pathlib import Path
from typing import NoReturn

import torch

from checkpoint import load
from configurator import (
    DTYPES,
    UNDO,
    fail,
    lacks_memory,
    override,
    pick_device,
    pick_dtype,
    printable,
)
from model import compile_step
from prepare_shakespeare import text_of
from view import compiler_works, in_colour, page, see

# -----------------------------------------------------------------------------
out_dir = "out"  # the folder of the run
start = "\n"  # the prompt, in which \n is a line end; or FILE:path
num_samples = 3  # sampled together, as one batch
max_new_tokens = 500  # in each sample
stop = ""  # a text that ends a sample, where it first comes after the prompt; \n as in start
temperature = 0.8  # below 1 less varied, above 1 more; 0: always the likeliest token
top_k = 200  # sample from the k likeliest tokens; 0: from all
top_p = 1.0  # sample from the fewest tokens that hold this probability; 1: from all
seed = 1337  # the same gives the same text; the first sample is the same for any num_samples
show_experts = False  # colour each token by its experts, in a terminal or with FORCE_COLOR set
html = ""  # a page to write, which shows what the model, and its experts, do at each token
read = ""  # a text, or FILE:path, to show with html or show_experts; nothing is sampled
interactive = False  # you type, the model goes on, and so forth
checkpoint = "ckpt.pt"  # or ckpt_best.pt, where train.py left one
device = "auto"  # CUDA, else MPS, else CPU; or cpu, cuda, cuda:1, mps
dtype = "auto"  # of weights and cache: as in train.py; or bfloat16, float16, float32
compile = False  # torch.compile: small models sample faster, after 10 to 30 s of compiling
# -----------------------------------------------------------------------------
LEAST = {"num_samples": 1, "top_k": 0, "max_new_tokens": 0, "temperature": 0.0}
ALLOWED, PATHS = {"dtype": DTYPES}, ("out_dir", "html", "checkpoint")
settings = override(globals(), sys.argv[1:])
globals().update(settings)

if not 0 < top_p <= 1:
    fail(f"top_p={top_p}: must be in (0, 1]; 1 keeps all tokens")
if not 0 <= seed < 2**63:
    fail(f"seed={seed}: must be from 0 to 2**63 - 1")
if read and not (html or show_experts):
    fail("read: shows a text with --html=FILE or --show_experts; give one of them")
if html and (Path(html).is_dir() or not Path(html).parent.is_dir()):
    fail(f"html={html!r}: must be a file in a folder that exists")
shown = printable if sys.stdout.isatty() else str


class Sample:
    """One text as it comes, token by token."""

    def __init__(self, ids: list[int]):
        self.ids, self.text, self.ended = list(ids), "", False
        # A BPE token can end inside a character, hence an incremental decoder.
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, *tokens: int, final: bool = False) -> str:
        """Takes tokens; the text that they add, up to the end of `stop`. `final`: no more come."""
        self.ids += tokens
        before = len(self.text)
        self.text += self.decoder.decode(tokenizer.decode_bytes(tokens), final)
        found = self.text.find(stop, max(0, before + 1 - len(stop))) if stop else -1
        if found >= 0:
            self.text, self.ended = self.text[: found + len(stop)], True
        return self.text[before:]


def given(name: str) -> str:
    """The text of a setting, in which \\n is a line end; or of the file that FILE:path names."""
    value = settings[name]
    if not value.startswith("FILE:"):
        return value.replace("\\n", "\n")
    path = value.removeprefix("FILE:")
    try:
        return text_of(Path(path).expanduser().read_bytes(), tokenizer.kind)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{name}: cannot read the file {path!r}: {reason}") from None


def draw(ids: list[int], number: int, as_it_comes: bool) -> tuple[list[Sample], bool]:
    """Continues these tokens `number` times, printing as they come if asked to; also whether Ctrl-C
    ended it early."""
    samples, interrupted = [Sample(ids) for _ in range(number)], False
    prompt = torch.tensor([ids], device=device).expand(number, -1)
    try:
        for tokens in model.stream(prompt, max_new_tokens, **how):
            for sample, token in zip(samples, tokens[:, 0].tolist(), strict=True):
                new = "" if sample.ended else sample.add(token)
                if as_it_comes:
                    print(shown(new), end="", flush=True)
            if all(sample.ended for sample in samples):
                break
    except KeyboardInterrupt:  # what has been sampled counts
        interrupted = True
    for sample in samples:
        rest = "" if sample.ended else sample.add(final=True)
        if as_it_comes:
            print(shown(rest))
    return samples, interrupted


def converse() -> NoReturn:
    """Continues what the user types, and all that stands before it, again and again."""
    print("Type, and the model goes on. \\n is a line end. Ctrl-C stops a text, Ctrl-D ends.")
    text = []
    while True:
        try:
            typed = input("> ").replace("\\n", "\n")
        except EOFError:
            print()
            sys.exit(0)
        try:
            text += tokenizer.encode(typed)
        except ValueError as error:
            print(error)
            continue
        (sample,), _ = draw(text or ids, 1, as_it_comes=True)
        text = sample.ids


try:
    device = pick_device(device)
    model, tokenizer = load(out_dir, device, checkpoint)
    model.to(getattr(torch, pick_dtype(dtype, device)))
    if show_experts and model.config.n_expert == 0:
        raise ValueError(f"{out_dir}/{checkpoint}: n_expert=0: this model has no experts to show")
    if show_experts and not (sys.stdout.isatty() or os.environ.get("FORCE_COLOR")):
        show_experts = False
        why = "no colours, as this is no terminal; FORCE_COLOR=1 asks for them anyway"
        print(f"sample.py: {why}", file=sys.stderr)
    if read:
        start, num_samples, max_new_tokens = given("read"), 1, 0
    else:  # a line end, where the text has one
        start = given("start") if "start" in settings.where else tokenizer.prompt
    stop = stop.replace("\\n", "\n")
    ids = tokenizer.encode(start)
    if not ids:
        raise ValueError(f"{'read' if read else 'start'}: is empty; give at least one character")
    tokenizer.encode(stop)  # which a vocabulary that lacks a character of it could never write

    compile = compile and compiler_works(device)
    if compile:
        compile_step(model, options={"cpp_wrapper": device == "cpu"})  # calls the graph sooner
    generator = torch.Generator(device).manual_seed(seed)
    how = dict(temperature=temperature, top_k=top_k or None, top_p=top_p, generator=generator)
    if interactive:
        converse()
    as_it_comes = num_samples == 1 and not show_experts
    if as_it_comes:
        print(shown(start), end="", flush=True)
    samples, interrupted = draw(ids, num_samples, as_it_comes)
    seen = []
    if show_experts or html:
        rows = [torch.tensor([sample.ids], device=device) for sample in samples]
        seen = [see(model, tokenizer, row) for row in rows]
    if not as_it_comes:
        for k, sample in enumerate(samples):
            print(in_colour(seen[k]) if show_experts else shown(start + sample.text))
            print("---------------")
    if html:
        Path(html).write_text(page(seen), encoding="utf-8", newline="\n")
        print(f"{html}: written; open it in a browser", file=sys.stderr)
    sys.stdout.flush()
    sys.exit(130 if interrupted else 0)
except (ValueError, OSError) as error:
    fail(error)
except (RuntimeError, MemoryError) as error:
    said = str(error).strip().partition("\n")[0]
    if compile and isinstance(error, torch._dynamo.exc.TorchDynamoException):
        fail(f"compile=True: {said}; leave --compile out")
    if not lacks_memory(error):
        raise
    fail(f"not enough memory; lower --num_samples or --max_new_tokens ({said})")
except KeyboardInterrupt:
    print()
    sys.exit(130)
finally:
    UNDO.close()
