"""Hydra YAML groups, importable as megalite.configs. Values only: types, rules and meanings live in megalite.config."""
