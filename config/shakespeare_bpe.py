# Shakespeare in GPT-2's BPE: 300,000 tokens of tinyshakespeare, so it overfits soon.

out_dir = "out-shakespeare-bpe"
dataset = "shakespeare_gpt2"
eval_interval = 100
always_save_checkpoint = False
wandb_run_name = "shakespeare-bpe"
dropout = 0.2
learning_rate = 3e-3
min_lr = 3e-4
beta2 = 0.99

# The layer of shakespeare_char_dense.py.
lateral = True
decoder_self_attention = False
shared_kv = True
position_embedding = "rotary"
token_shift = True

on_cuda = {
    "block_size": 256,
    "batch_size": 32,
    "n_layer": 3,
    "n_head": 6,
    "n_embd": 384,
    "max_iters": 1000,
    "eval_iters": 50,
    "compile": True,
}

on_cpu = {
    "block_size": 64,
    "batch_size": 8,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 64,
    "max_iters": 500,
    "eval_iters": 10,
}
