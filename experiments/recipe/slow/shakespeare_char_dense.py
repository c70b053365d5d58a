# config/shakespeare_char_dense.py as it was for a CPU of 66 GFLOP/s.

out_dir = "out-shakespeare-char-dense"
dataset = "shakespeare_char"
eval_interval = 500
always_save_checkpoint = False  # the small corpus invites overfitting: keep the best
wandb_run_name = "shakespeare-char-dense"

# The best layer of the search in experiments/recipe: the decoder reads the past through the encoder
# alone, which leaves one attention less, and gets the encoder's view of each token beside it.
lateral = True
decoder_self_attention = False

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
    "max_iters": 2650,
    "lr_decay_iters": 2650,
    "eval_iters": 20,
    "compile": False,
}
