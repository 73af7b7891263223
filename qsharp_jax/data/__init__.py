"""Text and rollouts as arrays: tokenizers, rollout records on disk, fixed-shape batches."""
