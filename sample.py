"""Draws text from a checkpoint of train.py; of its folder, ckpt.pt alone is needed.

python sample.py --out_dir=out-shakespeare-char
python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=1
python sample.py --out_dir=out-shakespeare-char --start=FILE:prompt.txt --temperature=0
"""

import codecs
import sys
from pathlib import Path

import torch

from config import fail, override, pick_device
from model import load_checkpoint
from prepare_shakespeare import Tokenizer

# -----------------------------------------------------------------------------
out_dir = "out"  # the folder of the run
start = "\n"  # the prompt, or FILE:path
num_samples = 3
max_new_tokens = 500  # in each sample
temperature = 0.8  # below 1 less varied, above 1 more; 0: always the likeliest token
top_k = 200  # draw from the k likeliest tokens only; 0: from all
top_p = 1.0  # draw from the fewest tokens that hold this probability; 1: from all
seed = 1337
checkpoint = "ckpt.pt"  # or ckpt_best.pt, where train.py left one
device = "auto"  # CUDA, else MPS, else CPU; or cpu, cuda, cuda:1, mps
# -----------------------------------------------------------------------------
globals().update(override(globals(), sys.argv[1:]))

if num_samples < 1:
    fail(f"num_samples={num_samples}: must be at least 1")
try:
    device = pick_device(device)
    path = Path(out_dir, checkpoint)
    model, saved = load_checkpoint(path, device)
    try:
        tokenizer = Tokenizer(**saved["tokenizer"])
    except (KeyError, TypeError):
        raise ValueError(f"{path}: holds no tokenizer; train.py writes one into it") from None
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"{path}: its tokenizer has {tokenizer.vocab_size} tokens, its model "
            f"{model.config.vocab_size}"
        )
    if start.startswith("FILE:"):
        start = Path(start.removeprefix("FILE:")).read_text(encoding="utf-8")
    ids = tokenizer.encode(start)
    if not ids:
        raise ValueError("start: is empty; give at least one character")
    prompt = torch.tensor([ids], device=device).expand(num_samples, -1)
    generator = torch.Generator(device).manual_seed(seed)
    how = dict(temperature=temperature, top_k=top_k or None, top_p=top_p, generator=generator)
    new_tokens = model.stream(prompt, max_new_tokens, **how)
    if num_samples == 1:
        # A BPE token can end inside a character, hence the incremental decoder.
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        print(start, end="", flush=True)
        for token in new_tokens:
            text = decoder.decode(tokenizer.decode_bytes(token[0].tolist()))
            print(text, end="", flush=True)
        print(decoder.decode(b"", final=True))
    else:
        rows = torch.cat([prompt, *new_tokens], dim=1)
        for row in rows.tolist():
            print(tokenizer.decode(row))
            print("---------------")
except (ValueError, OSError) as error:
    fail(str(error).partition("\n")[0])
except KeyboardInterrupt:
    print()
    sys.exit(130)
