# The baseline: a plain GPT. On a CPU a search chose its settings, too, for the same two minutes; on
# a CUDA GPU it has as many parameters as config/shakespeare_char_dense.py.

base = "shakespeare_char_dense.py"
out_dir = "out-decoder-only"
wandb_run_name = "decoder-only"

arch = "decoder_only"

on_cuda = {"n_layer": 6, "n_head": 6, "n_embd": 384}
on_cpu = {
    "n_layer": 3,
    "n_head": 3,
    "n_embd": 96,
    "learning_rate": 1e-2,
    "muon_lr_ratio": 2.0,
    "muon_weight_decay": 0.1,
    "max_iters": 3300,
}
