"""Brokers and stores with one mistake each, as people make them; the suite has to find each."""
