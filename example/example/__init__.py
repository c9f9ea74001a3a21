"""A small Django site that keeps its pictures with Tribrick."""
