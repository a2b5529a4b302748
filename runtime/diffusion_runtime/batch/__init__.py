"""`coreml-sd batch`: many pictures from a table of prompts, on several workers, going on where it stopped.

rows.py      the table: one row, one prompt with any of generate's options
places.py    where pictures and results.jsonl go: a folder, or object storage
tasks.py     rows as tasks with a seed and a key each; what an earlier run has done
worker.py    loads the models once and makes one row after the other
local.py     workers that are processes here
on_ray.py    workers that are actors of a Ray cluster
run.py       all of it together
"""
