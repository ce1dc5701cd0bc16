"""Reports of a run folder: `report.json` and self-contained HTML pages."""
