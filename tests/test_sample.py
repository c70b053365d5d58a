"""Tests of sample.py; those of what it shows of the experts are in test_view.py."""

import re
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from checkpoint import load
from common import OFFLINE, ROOT, call, fails_with, run, start, succeed
from prepare_shakespeare import prepare


def test_sample_needs_the_checkpoint_alone(trained, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/ckpt.pt").write_bytes((trained[0] / "whole/ckpt.pt").read_bytes())
    args = ("--num_samples=2", "--max_new_tokens=40", "--device=cpu", "--start=def ")
    printed = succeed(tmp_path, "sample.py", *args)
    samples = printed.split("\n---------------\n")
    assert len(samples) == 3 and samples[2] == ""
    assert all(s.startswith("def ") and len(s) == 44 for s in samples[:2])
    assert samples[0] != samples[1]
    assert printed == succeed(tmp_path, "sample.py", *args)
    assert printed != succeed(tmp_path, "sample.py", *args, "--seed=5")
    (tmp_path / "prompt.txt").write_text("class A:\n    ")
    args = ("--num_samples=1", "--temperature=0", "--max_new_tokens=30", "--device=cpu")
    printed = succeed(tmp_path, "sample.py", *args, "--start=FILE:prompt.txt")
    assert printed.startswith("class A:\n    ") and len(printed) == 13 + 30 + 1


def test_without_a_prompt_it_starts_as_train_py_does(tmp_path, monkeypatch, capsys):
    """Also where the text has no line end."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("to be or not to be " * 99)
    prepare(path="a.txt", name="mine")
    assert call("--dataset=mine", "--max_iters=1") == 0
    assert "\nA sample:\n " in capsys.readouterr().out
    assert call("--max_new_tokens=9", "--device=cpu", script="sample.py", tiny=False) == 0
    samples = capsys.readouterr().out.split("\n---------------\n")
    assert [(text[0], len(text)) for text in samples[:-1]] == [(" ", 10)] * 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_says_as_much_as_float32(dtype, trained):
    """Not the same text, since logits differ; but each likely token is likely in both."""
    args = ("--out_dir=whole", "--device=cpu", "--start=def ", "--num_samples=1", "--temperature=0")
    whole, half = (
        succeed(trained[0], "sample.py", *args, f"--dtype={name}") for name in ("float32", dtype)
    )
    assert half.startswith("def ") and len(half) == len(whole) == 4 + 500 + 1
    assert half[:8] == whole[:8]


def test_load_gives_a_trained_model_and_its_tokenizer(trained, monkeypatch):
    """Two lines from a run to text: what sample.py says, on the best device, in evaluation."""
    monkeypatch.chdir(trained[0])
    model, tokenizer = load("whole")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert not model.training and model.tok_emb.weight.device.type == device
    idx = torch.tensor([tokenizer.encode("def ")], device=device)
    text = tokenizer.decode(model.generate(idx, 60, temperature=0)[0].tolist())
    args = ("--out_dir=whole", "--start=def ", "--num_samples=1", "--temperature=0")
    assert text + "\n" == succeed(trained[0], "sample.py", *args, "--max_new_tokens=60")
    with pytest.raises(ValueError, match="absent/ckpt.pt: there is no checkpoint"):
        load("absent")


@pytest.mark.parametrize("prompt", ["\\n\\ndef ", "FILE:prompt.txt"])
def test_line_ends_in_a_prompt(prompt, trained, tmp_path):
    """A shell gives two characters for one; editors give marks, and other ends of lines."""
    shutil.copytree(trained[0] / "whole", tmp_path / "out")
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbf\r\n\r\ndef ")
    args = (f"--start={prompt}", "--num_samples=1", "--max_new_tokens=300", "--device=cpu")
    printed = succeed(tmp_path, "sample.py", *args, "--stop=e\\n")
    assert printed.startswith("\n\ndef ")
    found = printed.find("e\n", 6)
    assert found in (-1, len(printed) - 3) or printed[found + 2 :] == "\n"


def test_one_model_in_several_threads(trained):
    model, tokenizer = load(trained[0] / "whole", device="cpu")
    prompts = [tokenizer.encode(text) for text in ("def ", "class A", "import torch\n", "x")] * 6

    def sample(ids):
        idx = torch.tensor([ids])
        drawn = model.generate(idx, 60, generator=torch.Generator().manual_seed(len(ids)))
        return drawn[0].tolist(), model(idx).logits.tolist()

    expected = [sample(ids) for ids in prompts]
    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(sample, prompts)] == expected


def test_without_a_compiler_it_samples_without_compiling(trained):
    env = {**OFFLINE, "CXX": "absent-g++", "TORCHINDUCTOR_CACHE_DIR": str(trained[0] / "cache")}
    args = ("--out_dir=whole", "--device=cpu", "--start=model", "--compile", "--max_new_tokens=5")
    done = run(trained[0], "sample.py", *args, env=env, fresh=True)  # torch has read CXX
    said = r"compile=True: goes on without \(InductorError: .*No working C\+\+ compiler found.*\)\n"
    assert done.returncode == 0 and re.fullmatch(said, done.stderr), done.stderr
    assert done.stdout == succeed(trained[0], "sample.py", *args[:3], args[4])


def test_a_single_sample_streams(trained):
    args = ("--out_dir=whole", "--num_samples=1", "--max_new_tokens=1000000", "--device=cpu")
    # Where the tests run in the background, an ignored SIGINT would be inherited.
    heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = start(trained[0], "sample.py", *args, "--start=model", first=heed)
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    first = process.stdout.buffer.read(25)
    assert first.startswith(b"model") and process.poll() is None
    process.send_signal(signal.SIGINT)
    rest = process.stdout.buffer.read()
    watchdog.cancel()
    assert process.wait(timeout=30) == 130 and len(rest) < 500_000


@pytest.mark.parametrize(
    "args, said",
    [
        (("--out_dir=absent",), "absent/ckpt.pt: there is no checkpoint"),
        (("--start=ab\u72d0",), "the vocabulary has no character '\u72d0'"),
        (("--stop=ab\u72d0",), "the vocabulary has no character '\u72d0'"),
        (("--start=",), "start: is empty"),
        (("--start=FILE:absent.txt",), "absent.txt"),
        (("--num_samples=0",), "num_samples=0: must be at least 1"),
        (("--device=tpu",), "device='tpu': "),
        (("--checkpoint=absent.pt",), "whole/absent.pt: there is no checkpoint"),
        (("--top_p=2",), "top_p=2.0: must be in"),
        (("--temperature=-1",), "temperature=-1.0: must be at least 0"),
        (("--temperature=1e999",), "temperature takes float|temperature=inf: must be finite"),
        (("--top_k=-1",), "top_k=-1: must be at least 0"),
        (("--max_new_tokens=-1",), "max_new_tokens=-1: must be at least 0"),
        (("--max_new_tokens=100000000000000", "--start=a"), "not enough memory; lower --num_sam"),
    ],
)
def test_a_mistake_in_sampling_gets_one_line(args, said, trained):
    fails_with(said, trained[0], "sample.py", "--out_dir=whole", "--device=cpu", *args)


def test_a_model_without_experts_shows_none(trained):
    args = ("--out_dir=whole", "--show_experts", "--device=cpu")
    fails_with("n_expert=0: this model has no experts", trained[0], "sample.py", *args)


def test_a_conversation_goes_on_from_all_that_stands_before(trained):
    """What is typed, and the text behind it; a character that the vocabulary lacks is said."""
    args = ("--out_dir=whole", "--device=cpu", "--max_new_tokens=20", "--temperature=0")
    command = [sys.executable, ROOT / "sample.py", *args, "--interactive"]
    done = subprocess.run(
        command, cwd=trained[0], env=OFFLINE, input="def \n\u0416\n\\nclass\n",
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    said, first, lacks, second, end = done.stdout.split("> ")
    assert said.startswith("Type, and the model goes on.") and end == "\n"
    alone = succeed(trained[0], "sample.py", *args, "--start=def ", "--num_samples=1")
    assert "def " + first == alone and "\u0416" in lacks
    so_far = alone.removesuffix("\n") + "\nclass"
    both = succeed(trained[0], "sample.py", *args, f"--start={so_far}", "--num_samples=1")
    assert so_far + second == both
