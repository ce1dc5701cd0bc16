"""Shared by all folders: errors, files, typed rows, the scheme, the recipe, methods, the machine."""
