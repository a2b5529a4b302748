"""Subcommands of ``coreml-diffusion``, a file for each group; ``register(app)`` adds them. They parse and print."""
