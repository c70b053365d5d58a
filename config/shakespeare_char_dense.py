# Characters of Shakespeare, without experts. All presets but shakespeare_bpe.py build on it.
# On a CUDA GPU the size of nanoGPT's character-level setting; elsewhere what a search chose for two
# minutes on 2 cores: docs/results.md, "The recipe".

out_dir = "out-shakespeare-char-dense"
dataset = "shakespeare_char"
eval_interval = 500
always_save_checkpoint = False  # the small corpus invites overfitting: keep the best
wandb_run_name = "shakespeare-char-dense"

# The idea taken to its end: the decoder runs on top of the encoder, reads the past only through it,
# and shares its keys and values.
lateral = True
decoder_self_attention = False
shared_kv = True
position_embedding = "rotary"
token_shift = True

on_cuda = {
    "block_size": 256,
    "batch_size": 64,
    "n_layer": 3,
    "n_head": 5,
    "n_embd": 400,
    "qk_norm": True,  # on a CPU it costs a tenth of a step
    "dropout": 0.2,
    "learning_rate": 3e-3,
    "min_lr": 3e-4,
    "beta2": 0.99,
    "warmup_iters": 100,
    "max_iters": 1500,  # on an H100 a longer one overfitted from 1,000 on
    "eval_interval": 250,
    "eval_iters": 200,
    "compile": True,
}

on_cpu = {
    "block_size": 256,
    "batch_size": 6,
    "n_layer": 2,
    "n_head": 3,
    "n_embd": 96,
    "dropout": 0.0,
    "learning_rate": 2e-2,
    "lr_schedule": "linear",
    "min_lr": 0.0,
    "muon_lr_ratio": 1.0,
    "muon_momentum": 0.9,
    "muon_weight_decay": 0.05,
    "beta2": 0.99,
    "grad_clip": 0.0,
    "warmup_iters": 120,
    "max_iters": 2500,
    "eval_iters": 10,
    "compile": False,
}
