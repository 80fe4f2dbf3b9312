"""Draft-head speculative decoding: torch in, torch out, no cluster."""
