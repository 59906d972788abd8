"""How many layers can go: the best plan of every number of layers, and what it costs."""
