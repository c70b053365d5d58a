# The main job: characters of Shakespeare, with experts.

base = "shakespeare_char_dense.py"
out_dir = "out-shakespeare-char"
wandb_run_name = "shakespeare-char"

# 16 experts in each feed-forward block. The decoder's routers read the encoder, so that a prompt
# costs the encoder alone. The penalty grows over the run, most at the end.
n_expert = 16
router_input = "encoder"
l1_norm = "squared"
l1_weight = 0.05
penalty_schedule = "exponential"

on_cpu = {"max_iters": 1800}  # a step takes longer: somewhat less time
