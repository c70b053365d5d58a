# config/decoder_only.py as it was for a CPU of 66 GFLOP/s.

out_dir = "out-decoder-only"
dataset = "shakespeare_char"
eval_interval = 500
arch = "decoder_only"
always_save_checkpoint = False  # the small corpus invites overfitting: keep the best
wandb_run_name = "decoder-only"

on_cpu = {
    "block_size": 64,
    "batch_size": 12,
    "n_layer": 2,
    "n_head": 3,
    "n_embd": 93,
    "dropout": 0.0,
    "learning_rate": 1e-2,
    "lr_schedule": "linear",
    "min_lr": 0.0,
    "muon_momentum": 0.9,
    "beta2": 0.99,
    "grad_clip": 0.0,
    "warmup_iters": 60,
    "max_iters": 3000,
    "lr_decay_iters": 3000,
    "eval_iters": 20,
    "compile": False,
}
