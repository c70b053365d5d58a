# The layer with every variant off, with as many parameters as config/shakespeare_char_dense.py.

base = "shakespeare_char_dense.py"
out_dir = "out-canonical"
wandb_run_name = "canonical"

lateral = False
decoder_self_attention = True
shared_kv = False
position_embedding = "learned"
token_shift = False

on_cuda = {"n_embd": 360, "qk_norm": False}
on_cpu = {"n_head": 2, "n_embd": 86, "max_iters": 1900}
