# The layer with every variant off, with as many parameters as config/shakespeare_char_dense.py.

base = "shakespeare_char_dense.py"
out_dir = "out-canonical"
wandb_run_name = "canonical"

lateral = False
decoder_self_attention = True
shared_kv = False

on_cuda = {"n_embd": 360, "position_embedding": "learned", "qk_norm": False, "token_shift": False}
on_cpu = {"n_embd": 76, "max_iters": 3000}
