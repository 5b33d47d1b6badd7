"""A compressed model for other runtimes. Each module needs the packages of the extra that is_named its name."""
