"""Subcommands of ``coreml-diffusion``, one file for each group: ``register(app)`` adds them. They parse and print."""
