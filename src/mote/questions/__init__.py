"""Question files and data sets to `Question` rows, without duplicates and evaluation questions."""
