# Characters of Shakespeare, with experts of which at most half stay on.

base = "shakespeare_char.py"
out_dir = "out-shakespeare-char-sparse"
wandb_run_name = "shakespeare-char-sparse"

# Of the penalties tried, this costs the least loss for the experts that it turns off.
l1_norm = "linear"
l1_weight = 0.15
penalty_schedule = "linear"
