"""Question files and data sets -> `Question` rows, without duplicates and evaluation questions."""
