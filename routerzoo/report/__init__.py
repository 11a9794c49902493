"""The report of a sweep: numbers with their uncertainty, pictures, and one HTML page.

`collect` reads the runs, `statistics` compares them, `pictures` draws, `page` writes HTML, Markdown and CSV.
"""
