# config/shakespeare_char.py as it was for a CPU of 66 GFLOP/s.

out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"
eval_interval = 500
always_save_checkpoint = False  # the small corpus invites overfitting: keep the best
wandb_run_name = "shakespeare-char"

# The best layer of the search in experiments/recipe: the decoder reads the past through the encoder
# alone, which leaves one attention less, and gets the encoder's view of each token beside it.
lateral = True
decoder_self_attention = False

# 16 experts in each feed-forward block. The penalty grows over the run, most at the end.
n_expert = 16
l1_norm = "squared"
l1_weight = 0.05
penalty_schedule = "exponential"

on_cpu = {
    "block_size": 64,
    "batch_size": 12,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 64,
    "dropout": 0.0,
    "learning_rate": 1e-2,
    "lr_schedule": "linear",
    "min_lr": 0.0,
    "muon_momentum": 0.9,
    "beta2": 0.99,
    "grad_clip": 0.0,
    "warmup_iters": 60,
    "max_iters": 2000,
    "lr_decay_iters": 2000,
    "penalty_iters": 2000,
    "eval_iters": 20,
    "compile": False,
}
