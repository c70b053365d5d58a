# The baseline: a plain GPT with as many parameters as config/shakespeare_char_dense.py.
# Seven of its layers have the matrices of three parallel ones.

out_dir = "out-decoder-only"
dataset = "shakespeare_char"
arch = "decoder_only"
always_save_checkpoint = False
wandb_run_name = "decoder-only"

on_cuda = {
    "block_size": 256,
    "batch_size": 64,
    "n_layer": 7,
    "n_head": 6,
    "n_embd": 384,
    "dropout": 0.2,
    "learning_rate": 1e-3,
    "min_lr": 1e-4,
    "beta2": 0.99,
    "max_iters": 5000,
    "lr_decay_iters": 5000,
    "eval_iters": 200,
    "compile": True,
}

on_cpu = {
    "block_size": 64,
    "batch_size": 12,
    "n_layer": 4,
    "n_head": 2,
    "n_embd": 140,  # 0.8 % more parameters than two parallel layers of 128
    "dropout": 0.0,
    "learning_rate": 3e-3,
    "min_lr": 3e-4,
    "beta2": 0.99,
    "max_iters": 2000,
    "lr_decay_iters": 2000,
}
