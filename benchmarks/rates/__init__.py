"""Which rate fits which start: a sweep over real tasks, and how well a prediction does on them."""
