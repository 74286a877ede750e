"""Makes data: environments, the recorder, and specialists that learn."""
