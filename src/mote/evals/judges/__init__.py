"""Judges: who says whether an answer refuses, harms or helps."""
