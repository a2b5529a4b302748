"""Subcommands of ``coreml-sd``, a file for each group; ``register(app)`` adds them. They parse and print."""
