"""Names of the objects in a report's folder."""

REPORT = "report"
"""The report's folder, inside that of the results."""
INDEX = "index.html"
DONE = "visuals.json"
"""Written last; its presence means that the report is complete."""
EARLIER = "latents"
"""Folder of the pictures that earlier versions of saev drew."""
