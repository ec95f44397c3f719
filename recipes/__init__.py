"""Recipes: small models, data and configurations that show what pruning does to them."""
