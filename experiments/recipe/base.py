# Where the trials start from: no experts, two layers, the recipe of the search before.

dataset = "shakespeare_char"
always_save_checkpoint = False
block_size = 96
batch_size = 12
n_layer = 2
n_head = 2
n_embd = 84
position_embedding = "rotary"
token_shift = True
lateral = True
decoder_self_attention = False
shared_kv = True
learning_rate = 1e-2
lr_schedule = "linear"
min_lr = 0.0
muon_lr_ratio = 2.0
muon_momentum = 0.9
beta2 = 0.99
grad_clip = 0.0
warmup_iters = 120
max_iters = 1000
