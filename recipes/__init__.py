"""Recipes: small models, data sets and configurations that demonstrate pruning."""
