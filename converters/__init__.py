"""Takes in data that others recorded: one file per source format, each a generator of trajectories."""
