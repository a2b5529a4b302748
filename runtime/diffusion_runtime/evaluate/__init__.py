"""`coreml-sd evaluate`: a sweep over guidance scales, measured: CLIP score, Fréchet distance, KID, paired PSNR.

sources.py    a Hub id or a folder: configuration and safetensors, never a pickle
networks.py   CLIP, and the networks whose features tell sets of pictures apart
inception.py  Inception v3
distances.py  Fréchet distance and KID of two sets of features, and their floor
pictures.py   reference pictures, and the pictures that batches have made
sweep.py      the pictures of each set of models at each guidance scale, as `batch` makes them
measure.py    all of it together: a row for each set of models and guidance scale
report.py     table.csv, table.json, and the plot of distance against CLIP score
"""
