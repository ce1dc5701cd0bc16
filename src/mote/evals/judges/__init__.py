"""Judges: does an answer refuse, harm or help?"""
