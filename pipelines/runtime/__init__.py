"""Where stages run and what they leave: Ray, folders, locks, provenance."""
