"""Folders of models and the manifest that describes one."""
