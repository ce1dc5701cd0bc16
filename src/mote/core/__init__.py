"""What every part shares: errors, files, typed rows, the scheme, the recipe, the machine."""
