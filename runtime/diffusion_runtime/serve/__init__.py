"""`coreml-sd serve`: converted models over HTTP.

orders.py    what is asked for and what comes back, whatever the API
worker.py    a process that holds the models of one set and makes one order after the other
engine.py    the queue, the workers, the memory budget
guard.py     what is checked of every request before anything reads it
apis/        the APIs: Azure ML's /score, OpenAI's /v1/images, the web UI's /sdapi
metrics.py   what /metrics tells
app.py       all of it as one application; server.py runs it
"""
