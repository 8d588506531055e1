"""Training of adapters: recipes, data, the loop, and what it writes. Serving needs none of it."""
