"""What can go and what goes: saliency, ranking, the pruning loop, reshape, 2:4 sparsity."""
