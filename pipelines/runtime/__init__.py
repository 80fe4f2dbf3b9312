"""What all stages use to run and to write: Ray, folders, locks, provenance, files, tables, progress."""
