"""Palettize the weights of ML Programs: exact k-means, any bits per weight, checked after writing.

kmeans.py and palette.py make palettes of arrays; select.py says which weights are palettized, recipe.py and
damage.py with how many bits; palettize_package.py rewrites packages.
"""
