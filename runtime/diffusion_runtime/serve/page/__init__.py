"""`serve --ui`: a page at /, made with Gradio, that draws through the same queue as the APIs and loads nothing from
elsewhere.

layout.py    the page's controls and what happens when they are used
drawing.py   an order as the page follows it: its place in the queue, steps and previews, the pictures
gate.py      what of Gradio can be reached, and what it can be sent
*.html, *.js, *.css   the two parts that Gradio has not: a picture with a painted mask, and what was made
"""
