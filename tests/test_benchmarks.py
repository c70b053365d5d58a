"""Tests of the benchmarks of training: bench_gpu.py and profile_step.py with tiny models, on a CPU;
and that bench_training.py compares models of one size."""

import json

import pytest

LEAN, GPT, GPT2 = "lean", "GPT", "Hugging Face GPT-2"
SAME = {"lean, in series", "lean, two streams", "lean, in pairs"}  # its weights, in another order


def rows_of(result, *names):
    """The rows of a part, by the values of the columns."""
    assert result["failed"] is None and not result["left_out"], result
    return {tuple(row[name] for name in names): row for row in result["rows"]}


@pytest.mark.slow
def test_its_rows_make_sense(tmp_path, monkeypatch):
    """One part as the command runs it, another one inside this process, which saves imports."""
    import bench_gpu  # here, since it imports transformers

    out = tmp_path / "out.json"
    with pytest.raises(SystemExit) as end:
        bench_gpu.main(["--quick", "step", f"--out={out}"])
    results = json.loads(out.read_text("utf-8"))
    assert set(results) == {"step"} and not end.value.code
    monkeypatch.setattr(bench_gpu.torch, "set_num_threads", lambda n: None)
    for part in ("prompt", "decode"):
        bench_gpu.measure_part(part, str(tmp_path / part), "inf", "quick")
        here, *rows = map(json.loads, (tmp_path / part).read_text("utf-8").splitlines())
        rows, left = ([r for r in rows if isinstance(r, kind)] for kind in (dict, str))
        results[part] = here | {"failed": None, "left_out": [], "rows": rows, "wall_seconds": 0}
        assert len(left) == (part == "prompt") and all("it builds a mask" in one for one in left)
    prompt = rows_of(results["prompt"], "model", "way", "texts")
    assert {(LEAN, "graph", 1), ("GPT, GQA", "graph", 1), (GPT2, "eager", 2)} < set(prompt)
    step = rows_of(results["step"], "model", "how")
    trained = {GPT, LEAN, f"{LEAN}, 16 experts", f"{LEAN}, Muon", GPT2}
    assert set(step) == {(name, "eager") for name in trained} | {(LEAN, "compiled")}
    decode = rows_of(results["decode"], "model", "way", "texts", "C")
    assert {(name, "eager", 4, 64) for name in (LEAN, GPT, "GPT, GQA", GPT2)} < set(decode)
    for way in ("graph", "graph, fixed length"):
        assert {(n, way, 1, 64) for n in (LEAN, GPT, "lag(6)", *SAME)} < set(decode)
    assert (LEAN, "compiled, graph", 1, 64) in decode
    sizes = {}
    for result in results.values():
        assert result["gemm_peak"] > 0 and result["memory_bandwidth"] > 0
        for row in result["rows"]:
            assert row["ms"] > 0 and min(row["seconds"]) > 0 and row.get("error", 0) < 0.05
            key = (result["wall_seconds"], row["C"])
            if row["model"] != "lag(6)":
                sizes.setdefault(key, []).append(row["parameters"])
    for parameters in sizes.values():
        assert max(parameters) < 1.1 * min(parameters)


def test_bench_training_compares_models_of_one_size():
    import bench_training as bench

    for size in bench.SIZES.values():
        built = {name: bench.build(name, size)[0] for name in ("lean", bench.BASELINE, bench.X)}
        lean, gpt, peer = map(bench.num_params, built.values())
        assert lean == pytest.approx(gpt, rel=0.05 if size.C == 96 else 0.01)
        assert peer == pytest.approx(gpt, rel=0.01)
        assert built["lean"].config.shared_kv and built[bench.BASELINE].config.token_shift


def test_the_profile_of_a_step(capsys, monkeypatch):
    import profile_step

    monkeypatch.setattr(profile_step.torch, "set_num_threads", lambda n: None)
    sizes = ["--n_embd=32", "--n_head=2", "--block_size=16", "--batch_size=2"]
    profile_step.main(["config/shakespeare_char.py", *sizes], steps=10)
    first, *parts, whole, shares, calls = capsys.readouterr().out.splitlines()
    assert first.endswith("threads") and "--n_embd=32 " in first
    assert [part.split("  ")[0] for part in parts] == list(profile_step.PARTS)
    times = [float(line.split(" ms ")[0].split()[-1]) for line in (*parts, whole)]
    assert min(times) > 0 and sum(times[:-1]) == pytest.approx(times[-1], abs=0.05)
    percent = [int(share.split()[-1].rstrip("%")) for share in shares.split(", ")]
    assert sum(percent) == pytest.approx(100, abs=4) and percent[0] > 0
    assert int(calls.split()[0].replace(",", "")) > 1000
