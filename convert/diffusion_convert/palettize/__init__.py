"""Palettize the weights of ML Programs: exact k-means, any bits per weight, checked after writing.

kmeans.py and palette.py make palettes of arrays; select.py and plan.py say which weights get how many bits;
package.py rewrites packages.
"""
