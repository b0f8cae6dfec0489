"""`mpo report`: what runs wrote down, as a page to look at.

run_record.py  a run's folder → what it says
curves.py      metrics over steps, thinned for drawing
held_out.py    held-out groups: margins, worst ones, how log-probs moved
health.py      what a person should look at first
content.py     all of it as one JSON-like value
page/          that value → HTML, CSS and JavaScript; plotly.js draws
pictures.py    PNG files
"""
