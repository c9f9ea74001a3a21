"""What the commands in scripts/ have in common."""
