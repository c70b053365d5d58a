# Where the experiments start from: the canonical layer with 16 experts, 128 wide.

dataset = "shakespeare_char"
always_save_checkpoint = False
n_expert = 16
l1_norm = "squared"
l1_weight = 0.05
penalty_schedule = "linear"
penalty_iters = 1000
block_size = 64
batch_size = 12
n_layer = 2
n_head = 2
n_embd = 128
learning_rate = 3e-3
min_lr = 3e-4
beta2 = 0.99
warmup_iters = 100
max_iters = 2000
lr_decay_iters = 2000
