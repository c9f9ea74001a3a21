"""Pictures: pages, API, models."""
