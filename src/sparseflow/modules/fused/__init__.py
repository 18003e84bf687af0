"""Level 2: a model's traced graph runs instead of its forward, whole spiking blocks as one kernel."""
