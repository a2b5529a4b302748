"""Subcommands of ``coreml-sd``, a file for each group; `main` puts them together. They parse and print."""
