"""Where weights come from. Every kind of source becomes one `Checkpoint`; a VAE or a LoRA makes another of it."""
