"""What a run folder holds, as `report.json` and pages that load nothing from anywhere."""
