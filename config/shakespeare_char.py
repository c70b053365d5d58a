# The main job: characters of Shakespeare, with experts.
# On a CUDA GPU nanoGPT's character-level setting; elsewhere one that takes two minutes on 2 cores.

out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"
eval_interval = 250
always_save_checkpoint = False  # the small corpus invites overfitting: keep the best
wandb_run_name = "shakespeare-char"

# 16 experts in each feed-forward block. The coefficients were measured on a CPU: README, "Learned
# dropout". The penalty grows over the first half of the run.
n_expert = 16
l1_norm = "squared"
l1_weight = 0.05
penalty_schedule = "linear"

on_cuda = {
    "block_size": 256,
    "batch_size": 64,
    "n_layer": 3,
    "n_head": 6,
    "n_embd": 384,
    "dropout": 0.2,
    "learning_rate": 1e-3,
    "min_lr": 1e-4,
    "beta2": 0.99,
    "warmup_iters": 100,
    "max_iters": 5000,
    "lr_decay_iters": 5000,
    "penalty_iters": 2500,
    "eval_iters": 200,
    "compile": True,
}

on_cpu = {
    "block_size": 64,
    "batch_size": 12,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 128,
    "dropout": 0.0,
    "learning_rate": 3e-3,
    "min_lr": 3e-4,
    "beta2": 0.99,
    "warmup_iters": 100,
    "max_iters": 2000,
    "lr_decay_iters": 2000,
    "penalty_iters": 1000,
    "eval_iters": 20,
    "compile": False,
}
