"""Folders of models: variants, zips, the model card."""
