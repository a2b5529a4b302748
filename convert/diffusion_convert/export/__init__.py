"""From a torch module to a package: traced, converted, written."""
