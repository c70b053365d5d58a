# The baseline: a plain GPT with as many parameters as config/shakespeare_char_dense.py.

base = "canonical.py"
out_dir = "out-decoder-only"
wandb_run_name = "decoder-only"

arch = "decoder_only"

on_cuda = {
    "n_layer": 6,
    "n_head": 6,
    "n_embd": 384,
    "position_embedding": "rotary",
    "qk_norm": True,
    "token_shift": True,
}
on_cpu = {"n_layer": 3, "n_head": 3, "n_embd": 96, "max_iters": 3650}
