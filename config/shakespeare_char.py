# The main job: characters of Shakespeare, with experts.
# On a CUDA GPU the size and schedule of nanoGPT's character-level setting; elsewhere a setting for
# two minutes on 2 cores, which a search found with an earlier layer: README, "Results".

out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"
eval_interval = 500
always_save_checkpoint = False  # the small corpus invites overfitting: keep the best
wandb_run_name = "shakespeare-char"

# The idea taken to its end: the decoder runs on top of the encoder, reads the past only through it,
# and shares its keys and values.
lateral = True
decoder_self_attention = False
shared_kv = True

# 16 experts in each feed-forward block; the decoder's routers read the decoder. The penalty grows
# over the run, most at the end.
n_expert = 16
l1_norm = "squared"
l1_weight = 0.05
penalty_schedule = "exponential"

on_cuda = {
    "block_size": 256,
    "batch_size": 64,
    "n_layer": 3,
    "n_head": 6,
    "n_embd": 408,
    "dropout": 0.2,
    "learning_rate": 3e-3,
    "min_lr": 3e-4,
    "beta2": 0.99,
    "warmup_iters": 100,
    "max_iters": 5000,
    "lr_decay_iters": 5000,
    "penalty_iters": 5000,
    "eval_iters": 200,
    "compile": True,
}

on_cpu = {
    "block_size": 96,
    "batch_size": 12,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 84,
    "dropout": 0.0,
    "learning_rate": 1e-2,
    "lr_schedule": "linear",
    "min_lr": 0.0,
    "muon_momentum": 0.9,
    "beta2": 0.99,
    "grad_clip": 0.0,
    "warmup_iters": 120,
    "max_iters": 2800,
    "lr_decay_iters": 2800,
    "penalty_iters": 2800,
    "eval_iters": 20,
    "compile": False,
}
