"""The swapped layers: the user's own module objects, under a subclass that can run sparse."""
