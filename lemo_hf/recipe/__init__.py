"""Recipes: one flat YAML file says everything about a run. `reading` checks it, `running` carries it out."""

from .reading import DataFields, LoraFields, ModelFields, Recipe, describe_fields, read_recipe, recipe_fields

__all__ = ["DataFields", "LoraFields", "ModelFields", "Recipe", "describe_fields", "read_recipe", "recipe_fields"]
