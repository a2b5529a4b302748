"""From a checkpoint to a folder of verified models."""
