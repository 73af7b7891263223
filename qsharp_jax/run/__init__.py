"""A run's config, workdir, models and provenance."""
