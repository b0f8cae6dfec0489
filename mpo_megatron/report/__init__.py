"""`mpo report`: runs' records as a page.

run_record.py  a run's folder → its records
curves.py      metrics over steps, thinned for drawing
held_out.py    held-out groups: margins, worst ones, how log-probs moved
health.py      findings to look at first
content.py     everything as one JSON-like value
page/          that value → HTML, CSS and JavaScript; plotly.js draws
pictures.py    PNG files
"""
