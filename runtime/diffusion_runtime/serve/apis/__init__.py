"""The APIs, a file each, with a function that makes its routes."""
