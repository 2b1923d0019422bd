"""Rollouts: completions sampled from the policy, their rewards, and the batches that an update learns from."""
