"""Web pages to look at: a run's index.html, and what evaluate.py --html writes."""
