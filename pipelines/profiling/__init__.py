"""What steps cost on this machine."""
