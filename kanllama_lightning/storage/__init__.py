"""Files: written whole, read against a schema, classes by name, locks."""
