# Characters of Shakespeare, with experts of which at most half stay on.

base = "shakespeare_char.py"
out_dir = "out-shakespeare-char-sparse"
wandb_run_name = "shakespeare-char-sparse"

# Of the penalties tried, these cost the least loss for the experts that they turn off.
l1_norm = "linear"
l1_weight = 0.25
entropy_weight = 0.1
penalty_schedule = "linear"
